"""LLMReplica: the Serve deployment. One engine group and the HTTP application in front of it.

The replica is its own ingress, so tokens cross no DeploymentHandle (8 µs per token instead of
108 to 545). Everything here runs on one event loop, which nothing may block.
"""

import asyncio
import gc
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from ray import serve

from engine.config import EngineConfig
from serve_app.async_engine import AsyncEngine
from serve_app.autoscaling_stats import LoadMeter
from serve_app.draining import end_before_kill
from serve_app.http_app import create_http_app
from serve_app.metrics import Metrics
from serve_app.served_model import Limits, ServedModel
from serve_app.tracing import RequestTracer

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

DRAIN_POLL_S = 0.05


@serve.deployment(
    name="LLMReplica",
    max_ongoing_requests=100_000,  # the engine's bounded queue refuses, and says why
    health_check_period_s=1,  # Serve replaces a replica after three that fail
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=120,  # then open streams end with an error they can resume from
    graceful_shutdown_wait_loop_s=0.5,
)
@serve.ingress()
class LLMReplica:
    """Starts its engine actors in the other bundles of its placement group."""

    # Serve awaits a coroutine constructor, which Python's types have no word for.
    async def __init__(  # type: ignore[misc]
        self, config: EngineConfig, model_name: str, limits: Limits
    ) -> None:
        # Not at the top: Serve imports this module to build the application, and torch and
        # transformers would cost that process 4 s.
        from engine.ray_group import EngineGroup

        starting = asyncio.ensure_future(EngineGroup.start(config))
        try:
            tokenizer = await asyncio.to_thread(_load_tokenizer, config)
        except BaseException:
            starting.cancel()
            await asyncio.wait([starting])  # until its actors are gone
            raise
        group = await starting
        metrics = Metrics(model_name, group.info.session_len)
        self._model = ServedModel(
            name=model_name,
            created=int(time.time()),
            tokenizer=tokenizer,
            engine=AsyncEngine(group, lambda: EngineGroup.start(config), config, metrics),
            metrics=metrics,
            limits=limits,
            config=config,
            tracer=RequestTracer.create(),
        )
        self._meter = LoadMeter(config.max_num_seqs)
        self._ending = asyncio.ensure_future(end_before_kill(self._model.engine))
        _calm_garbage_collector()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_http_app(self._model)

    async def check_health(self) -> None:
        """Raises when the engine is gone for good; Serve then replaces the replica."""
        await self._model.engine.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What QueueDepthPolicy counts. Serve asks where there is an autoscaling_config."""
        engine = self._model.engine
        return asdict(self._meter.read(engine.stats, engine.num_open, time.time()))

    async def drain(self, patience_s: float) -> None:
        """The server stops: open requests may end for so long, the rest ends with an error."""
        deadline = time.monotonic() + patience_s
        engine = self._model.engine
        while engine.num_open and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        engine.stop()
        await asyncio.sleep(DRAIN_POLL_S)  # the error events are on their way


def _calm_garbage_collector() -> None:
    """Leave out the 150k objects of the start, and collect new ones less often.

    Each collection stops all streams: while a body of 2 MiB of empty lists was read they took
    0.8 s, then 0.1 s without the old objects, and 10 ms with a threshold of 50,000.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _load_tokenizer(config: EngineConfig) -> "Tokenizer":
    from engine.ray_weights import RayPeers
    from engine.tokenizer import Tokenizer

    checkpoint, peers = Path(config.model), RayPeers.of(config)
    return Tokenizer.load(checkpoint if peers is None else peers.origin(checkpoint).settings)
