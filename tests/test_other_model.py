"""A model whose replicas are others than the one that is asked: when one is woken, and which."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import QueueFullError
from serve_app.metrics import Metrics
from serve_app.model_files import read_context, version_of
from serve_app.model_spec import Limits, ModelSpec
from serve_app.models import Models, OtherModel
from tests.stub_engine import CONFIG, INFO, StubGroup, app_of, client_of, make_model
from tests.test_engines import World


def asked(checkpoint: Path, test: Callable[[httpx.AsyncClient, World], Awaitable[None]]) -> None:
    """A client of an application that has the model "other" beside its own."""

    async def run() -> None:
        world = World(has_own=False)
        config = replace(CONFIG, model=str(checkpoint), weights_cache=None)
        spec = ModelSpec("other", config, Limits(None, 8))
        context = read_context(config)
        metrics = Metrics("other", context.session_len)
        other = OtherModel(spec, 0, world.engines, metrics, context)
        models = Models(make_model(StubGroup(), checkpoint), [other])
        async with client_of(app_of(models)) as client:
            await test(client, world)
        models.stop()

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/tokenize", {"prompt": "a"}, 200),
        ("/detokenize", {"tokens": [65]}, 200),
        ("/v1/completions", {"prompt": [2**40]}, 400),
        ("/v1/completions", {"prompt": "a", "n": 9}, 400),
        ("/v1/completions", {"prompt": "a", "max_tokens": 10**6}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 10**5}]}, 400),
    ],
)
def test_only_generation_wakes_a_model(
    tiny_checkpoint: Path, path: str, fields: dict[str, Any], status: int
) -> None:
    async def test(client: httpx.AsyncClient, world: World) -> None:
        response = await client.post(path, json={"model": "other", **fields})
        assert response.status_code == status, response.text  # `attach` would fail

    asked(tiny_checkpoint, test)


def test_a_request_that_may_not_wait_for_it_is_refused(tiny_checkpoint: Path) -> None:
    async def test(client: httpx.AsyncClient, world: World) -> None:
        world.attached = [QueueFullError("many wait")]
        body = {"model": "other", "prompt": "a"}
        assert (await client.post("/v1/completions", json=body)).status_code == 429

    asked(tiny_checkpoint, test)


def test_a_version_is_what_decides_answers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for path in (here, there):
        shutil.copytree(tiny_checkpoint, path)
    config = replace(CONFIG, model=str(here), weights_cache=None)
    version = version_of(config)
    assert version_of(replace(config, session_len=INFO.session_len)) != version
    (weights,) = here.glob("*.safetensors")
    os.utime(weights, (1, 1))
    assert version_of(config) == version  # as on another node that fetched the same
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert version_of(config) != version
