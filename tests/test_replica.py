"""The replica in this process: the class Serve runs, its application and a real engine actor."""

import asyncio
import gc
import itertools
import json
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.context import _set_internal_replica_context
from ray.serve.schema import ReplicaRank

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, EngineDeadError
from serve_app.app import build_app
from serve_app.app_args import AppArgs
from serve_app.async_engine import AsyncEngine
from serve_app.model_spec import Limits, ModelSpec
from serve_app.replica import LLMReplica
from serve_app.served_model import INLINE_SIZE
from tests.stub_engine import client_of

T = TypeVar("T")


class RunningReplica:
    """A replica on a loop of its own, and a client of its application."""

    def __init__(self, checkpoint: Path, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        values: dict[str, Any] = {"dtype": "float32", "device": "cpu", "cache_max_entry_count": 64}
        values["model"] = str(checkpoint)
        self.run(self._start(EngineConfig.from_dict(values | settings)))

    async def _start(self, config: EngineConfig) -> None:
        deployment: Any = LLMReplica  # the decorator made it a Deployment
        # Serve awaits the class's own __del__; nobody would here.
        cls: Any = type("Replica", (deployment.func_or_class,), {"__del__": lambda self: None})
        self.replica: Any = cls.__new__(cls)
        _set_internal_replica_context(
            replica_id=ReplicaID("alone", DeploymentID("LLMReplica", "in this process")),
            servable_object=self.replica,
            _deployment_config=DeploymentConfig(),
            rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
            world_size=1,
        )
        await self.replica.__init__(ModelSpec("tiny", config, Limits(1_000_000, 8)))
        self._app = self.replica.__serve_build_asgi_app__()
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        self.client = client_of(self._app)
        self.engine: AsyncEngine = self.replica._own

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, 120))

    def get(self, path: str) -> httpx.Response:
        return self.run(self.client.get(path))

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.run(self.client.post(path, json=body))

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream but [DONE]."""
        *events, done, end = self.post(path, stream=True, **body).text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def close(self) -> None:
        self.run(self._lifespan.__aexit__(None, None, None))
        with pytest.raises(EngineDeadError, match="shutting down"):
            self.run(self.replica.check_health())
        self._loop.close()
        gc.unfreeze()  # at this process's end, torch's libraries miss what is never collected


@pytest.fixture(scope="module")
def running(ray_cluster: None, tiny_checkpoint: Path) -> Iterator[RunningReplica]:
    running = RunningReplica(tiny_checkpoint)
    yield running
    running.close()


pytestmark = pytest.mark.ray
COMPLETION = {"model": "tiny", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def test_a_stream_carries_what_the_whole_answer_holds(running: RunningReplica) -> None:
    body = {**COMPLETION, "prompt": ["abc", "What?"], "n": 2, "echo": True, "logprobs": 1}
    body |= {"return_token_ids": True, "prompt_logprobs": 0}
    whole = running.post("/v1/completions", **body).json()
    del body["prompt_logprobs"]
    events = running.stream("/v1/completions", **body, stream_options={"include_usage": True})
    assert events[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [
            part
            for event in events
            for part in event["choices"]
            if part["index"] == choice["index"]
        ]
        assert "".join(part["text"] for part in parts) == choice["text"]
        token_ids = [token_id for part in parts for token_id in part["token_ids"]]
        assert token_ids == choice["token_ids"]
        for name, values in choice["logprobs"].items():
            joined = [value for part in parts for value in part["logprobs"][name]]
            # Batches differ, and with them the last bits of a logit.
            assert json.loads(json.dumps(joined), parse_float=round_4) == json.loads(
                json.dumps(values), parse_float=round_4
            )
        assert choice["prompt_logprobs"][0] is None
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"


def round_4(text: str) -> float:
    return round(float(text), 3)


def test_much_that_is_asked_for_is_made_in_threads(running: RunningReplica) -> None:
    words = ["".join(letters) for letters in itertools.product("abcde", repeat=5)][:1000]
    body = {**COMPLETION, "prompt": ["abc " * 60] * 4, "bad_words": words}
    body |= {"echo": True, "logprobs": 20}
    answer = running.post("/v1/completions", **body).json()
    first, *others = [choice["logprobs"] for choice in answer["choices"]]
    assert len(first["tokens"]) * 21 * 4 > INLINE_SIZE
    for other in others:
        assert other["text_offset"] == first["text_offset"]
        assert other["tokens"] == first["tokens"]


def test_a_chat_streams_its_usage_as_it_goes(running: RunningReplica) -> None:
    events = running.stream(
        "/v1/chat/completions",
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=4,
        ignore_eos=True,
        return_token_ids=True,
        stream_options={"continuous_usage_stats": True},
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 4


@pytest.mark.parametrize("size", [1, 4000])
def test_long_and_short_prompts_are_encoded_alike(running: RunningReplica, size: int) -> None:
    text = "ab " * size
    tokenized = running.post("/tokenize", prompt=text, return_token_strs=True).json()
    tokens = tokenized["tokens"]
    assert "".join(tokenized["token_strs"]) == text
    assert running.post("/detokenize", tokens=tokens).json()["prompt"] == text
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    tokens = running.post("/tokenize", **body).json()["tokens"]
    prompt = running.post("/detokenize", tokens=tokens).json()["prompt"]
    assert prompt == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {**COMPLETION, "prompt": []}, 400),
        ("/v1/completions", {**COMPLETION, "prompt": [[]]}, 400),
        ("/v1/completions", {**COMPLETION, "prompt": [999]}, 400),
        ("/v1/completions", {**COMPLETION, "prompt": [-1], "echo": True}, 400),
        ("/v1/completions", {**COMPLETION, "prompt": "a", "stop_token_ids": [300]}, 400),
        ("/v1/completions", {**COMPLETION, "prompt": "a", "stream": True, "n": 0}, 400),
        ("/v1/completions", {**COMPLETION, "prompt": "a " * 100_000}, 400),
        ("/v1/completions", {**COMPLETION, "prompt": ["a"] * 9}, 400),
        ("/v1/completions", {**COMPLETION, "prompt": "a", "model": "b"}, 404),
        ("/detokenize", {"tokens": [], "model": "b"}, 404),
        ("/v1/none", {}, 404),
        ("/health", {}, 405),
    ],
)
def test_refusals(running: RunningReplica, path: str, body: dict[str, Any], status: int) -> None:
    response = running.post(path, **body)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_the_replica_says_what_it_is(running: RunningReplica) -> None:
    assert running.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    assert running.get("/v1/models/tiny").json()["id"] == "tiny"
    assert running.get("/health").status_code == 200
    assert running.get("/version").json()["version"]
    running.run(running.replica.check_health())


def test_the_autoscaler_hears_of_every_open_sequence(running: RunningReplica) -> None:
    """Also before the engine counts it; and of none once the last has ended."""
    idle = running.replica.record_autoscaling_stats()
    assert (idle["running"], idle["waiting"], idle["slots"]) == (0, 0, 256)

    async def stats_meanwhile() -> dict[str, float]:
        body = {**COMPLETION, "prompt": ["a"] * 8, "max_tokens": 64}
        answer = asyncio.ensure_future(running.client.post("/v1/completions", json=body))
        while not running.engine.num_open:
            await asyncio.sleep(0)
        stats: dict[str, float] = running.replica.record_autoscaling_stats()
        assert (await answer).status_code == 200
        return stats

    stats = running.run(stats_meanwhile())
    assert stats["running"] + stats["waiting"] == 8
    assert all(isinstance(value, int | float) for value in stats.values())
    assert running.engine.stats.num_running == running.engine.stats.num_waiting == 0
    assert running.engine.stats.kv_cache_usage == 0


def test_draining_waits_for_what_runs_and_ends_the_rest(
    ray_cluster: None, tiny_checkpoint: Path
) -> None:
    running = RunningReplica(tiny_checkpoint)

    async def ask(max_tokens: int) -> str:
        body = {**COMPLETION, "prompt": "a", "max_tokens": max_tokens, "stream": True}
        return (await running.client.post("/v1/completions", json=body)).text

    async def drain() -> list[str]:
        short, long = asyncio.ensure_future(ask(2)), asyncio.ensure_future(ask(500))
        await asyncio.sleep(0.05)
        await running.replica.drain(0.1)
        return [await short, await long]

    short, long = running.run(drain())
    assert short.endswith("data: [DONE]\n\n")
    *_, error, end = long.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert end == ""
    assert running.post("/v1/completions", **COMPLETION, prompt="a").status_code == 503
    running.close()


def test_a_group_of_ranks_gets_a_bundle_each(tiny_checkpoint: Path) -> None:
    engine = {"model": str(tiny_checkpoint), "tp": 2}
    on_cpu = _bundles(AppArgs(engine={**engine, "device": "cpu"}))
    assert sum(bundle["CPU"] for bundle in on_cpu) <= 2  # tp=2 must fit a laptop's two cores
    assert len(on_cpu) == 3
    on_gpu = _bundles(AppArgs(engine={**engine, "device": "cuda"}, cpus_per_rank=3))
    assert on_gpu == [{"CPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}]


def test_the_device_is_what_the_cluster_has(ray_cluster: None, tiny_checkpoint: Path) -> None:
    assert "GPU" not in _bundles(AppArgs(engine={"model": str(tiny_checkpoint)}))[1]


def test_an_engine_config_file_is_found_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    (tmp_path / "engine.yaml").write_text(f"model: {tiny_checkpoint}\ndevice: cpu\n")
    monkeypatch.chdir(tmp_path)
    assert len(_bundles(AppArgs(engine="engine.yaml"))) == 2
    with pytest.raises(ConfigError, match=r"cannot read engine config .*other\.yaml"):
        build_app(AppArgs(engine="other.yaml"))


def test_a_replica_that_cannot_load_says_why(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        RunningReplica(tmp_path)


def _bundles(args: AppArgs) -> list[dict[str, float]]:
    app: Any = build_app(args)
    bundles: list[dict[str, float]] = app._bound_deployment._replica_config.placement_group_bundles
    return bundles
