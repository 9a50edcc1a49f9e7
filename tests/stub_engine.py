"""A stand-in at the engine seam, for what a working engine cannot be made to do.

StubGroup has EngineGroup's methods and lets a test say what comes out. `served` puts the real
HTTP application in front of it, in this process.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import httpx
from fastapi import FastAPI

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDeadError
from engine.executor import EngineInfo
from engine.outboxes import OWNER
from engine.outputs import EngineStats, SequenceOutput
from engine.ray_group import EngineGroup
from engine.sequence import EngineRequest
from engine.tokenizer import Tokenizer
from serve_app.async_engine import AsyncEngine
from serve_app.engines import Engines
from serve_app.http_app import create_http_app
from serve_app.metrics import Metrics
from serve_app.model_spec import Limits, ModelSpec
from serve_app.models import Models
from serve_app.served_model import ServedModel

INFO = EngineInfo(
    vocab_size=300,
    session_len=128,
    num_blocks=16,
    block_size=16,
    dtype="float32",
    device="cpu",
    tp=1,
)
LIMITS = Limits(max_body_bytes=10_000, max_sequences=8)
CONFIG = EngineConfig(model="tiny", max_waiting_requests=6, max_waiting_tokens=100)


class StubGroup:
    """Records calls; `put` is what the next poll returns."""

    consumer = OWNER
    is_joined = True

    def __init__(self, engine_id: str = "") -> None:
        self.engine_id = engine_id
        self.info = INFO
        self.calls: list[list[str]] = []  # request ids of each submit
        self.requests: dict[str, EngineRequest] = {}
        self.admitted: list[str] = []
        self.aborted: list[str] = []
        self.stats = EngineStats()  # what polls tell
        self.stopped = False
        self.failure: Exception | None = None
        self.successors: list[StubGroup | Exception] = []  # what becomes of the next starts
        self._outputs: list[SequenceOutput] = []
        self._changed = asyncio.Event()

    def put(self, *outputs: SequenceOutput) -> None:
        self._outputs += outputs
        self._changed.set()

    def die(self, error: Exception) -> None:
        self.failure = error
        self._changed.set()

    async def start_next(self) -> EngineGroup:
        """What takes this group's place when it has died."""
        successor = self.successors.pop(0) if self.successors else ConfigError("no room")
        if isinstance(successor, Exception):
            raise successor
        return cast(EngineGroup, successor)

    async def submit(self, requests: list[EngineRequest], *, admitted: bool = False) -> None:
        self.calls.append([request.request_id for request in requests])
        self.admitted += [request.request_id for request in requests if admitted]
        self.requests |= {request.request_id: request for request in requests}

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def poll(self) -> tuple[list[SequenceOutput], EngineStats]:
        await self._changed.wait()
        self._changed.clear()
        if self.failure is not None:
            raise self.failure
        outputs, self._outputs = self._outputs, []
        return outputs, self.stats

    async def check(self) -> None:
        if self.failure is not None:
            raise EngineDeadError(str(self.failure))

    def stop(self) -> None:
        self.stopped = True

    async def wait_for(self, num_requests: int) -> list[str]:
        """Request ids once so many were submitted."""
        async with asyncio.timeout(10):
            while len(self.requests) < num_requests:
                await asyncio.sleep(0.001)
        return list(self.requests)


def engines_of(own: AsyncEngine, metrics: Metrics) -> Engines:
    """Of a replica that is alone."""

    def nobody(*args: Any) -> NoReturn:
        raise AssertionError("there is no other replica")

    return Engines(
        replica_id="alone",
        version="1",
        config=CONFIG,
        metrics=metrics,
        join=nobody,
        refer=nobody,
        own=own,
    )


def make_model(group: StubGroup, checkpoint: Path) -> ServedModel:
    metrics = Metrics("tiny", INFO.session_len)
    engine = AsyncEngine(cast(EngineGroup, group), group.start_next, CONFIG, metrics)
    spec = ModelSpec("tiny", CONFIG, LIMITS)
    tokenizer = Tokenizer.load(checkpoint)
    return ServedModel(spec, 0, tokenizer, engines_of(engine, metrics), metrics)


def app_of(models: Models) -> FastAPI:
    async def end() -> None:
        models.stop()

    return create_http_app(models, end)


@asynccontextmanager
async def served(checkpoint: Path) -> AsyncIterator[tuple[StubGroup, FastAPI]]:
    """The application over a stub; its lifespan runs as in a replica."""
    group = StubGroup()
    models = Models(make_model(group, checkpoint))
    app = app_of(models)
    async with app.router.lifespan_context(app):
        yield group, app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://stub")


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
