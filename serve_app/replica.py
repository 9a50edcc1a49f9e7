"""The Serve deployments: LLMReplica answers HTTP, EngineReplica only has an engine.

The first model's replicas are LLMReplicas, so tokens cross no DeploymentHandle (8 µs per token
instead of 108 to 545): what another replica's engine computes for them comes from that engine
itself. Serve allows one such deployment in an application, so further models have EngineReplicas.
Everything here runs on one event loop, which nothing may block.
"""

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from engine.config import EngineConfig
from serve_app.async_engine import AsyncEngine
from serve_app.autoscaling_stats import LoadMeter
from serve_app.directory import Entry, Member
from serve_app.draining import end_before_kill, log_failure, wait_for_guests
from serve_app.engines import Engines
from serve_app.http_app import create_http_app
from serve_app.metrics import Metrics
from serve_app.model_files import load_tokenizer, read_context, version_of
from serve_app.model_spec import ModelSpec
from serve_app.models import Models, OtherModel
from serve_app.served_model import ServedModel
from serve_app.tracing import RequestTracer

if TYPE_CHECKING:
    from engine.ray_group import EngineGroup

DRAIN_POLL_S = 0.05
SETTINGS: dict[str, Any] = {
    "max_ongoing_requests": 100_000,  # the engine's bounded queue refuses, and says why
    "health_check_period_s": 1,  # Serve replaces a replica after three that fail
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 120,  # then streams end with an error they can resume from
    "graceful_shutdown_wait_loop_s": 0.5,
}


class _Replica:
    """Starts its engine actors in the other bundles of its placement group."""

    _engines: Engines
    _metrics: Metrics
    _meter: LoadMeter

    async def _start(self, spec: ModelSpec) -> None:
        version = await asyncio.to_thread(version_of, spec.config)  # before anything is read
        group = await _start_group(spec.config)
        self._spec = spec
        self._metrics = Metrics(spec.name, group.info.session_len)
        own = AsyncEngine(group, partial(_start_group, spec.config), spec.config, self._metrics)
        self._engines = _engines(spec, version, self._metrics, own=own)
        self._meter = LoadMeter(spec.config.max_num_seqs)

    def _meet_others(self, uses: Models | Engines, starts_directory: bool) -> None:
        self._member = Member(
            serve.get_replica_context().app_name,
            starts=starts_directory,
            describe=partial(self._engines.describe, self._spec.name),
            on_others=uses.update,
        )
        self._ending = asyncio.ensure_future(end_before_kill(self._member.leave, uses.stop))
        self._ending.add_done_callback(log_failure)

    async def attach(self) -> Entry:
        """Its engine, for a replica that has none of this model; waits while it is replaced."""
        await self._own.connected()
        return await self._engines.entry(self._spec.name)

    async def check_health(self) -> None:
        """Raises when the engine is gone for good; Serve then replaces the replica."""
        await self._own.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What QueueDepthPolicy counts. Serve asks where there is an autoscaling_config."""
        stats = self._own.stats
        # What this replica sent there, or what others did as well: theirs is seen in the engine.
        num_open = max(self._own.num_open, stats.num_running + stats.num_waiting)
        return asdict(self._meter.read(stats, num_open, time.monotonic()))

    @property
    def _own(self) -> AsyncEngine:
        own = self._engines.own
        assert own is not None
        return own


@serve.deployment(name="LLMReplica", **SETTINGS)
@serve.ingress()
class LLMReplica(_Replica):
    """Of the first model: one engine group, and the HTTP application for all models."""

    # Serve awaits a coroutine constructor, which Python's types have no word for.
    async def __init__(  # type: ignore[misc]
        self,
        spec: ModelSpec,
        others: Sequence[ModelSpec] = (),
        handles: Sequence[DeploymentHandle[Any]] = (),
    ) -> None:
        starting = asyncio.ensure_future(self._start(spec))
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, spec.config)
        except BaseException:
            starting.cancel()
            await asyncio.wait([starting])  # until its actors are gone
            raise
        await starting
        created, tracer = int(time.time()), RequestTracer.create()
        other_models = zip(others, handles, strict=True)
        self._models = Models(
            ServedModel(spec, created, tokenizer, self._engines, self._metrics, tracer),
            [await _other_model(other, created, handle, tracer) for other, handle in other_models],
        )
        rank = serve.get_replica_context().rank.rank
        self._meet_others(self._models, bool(others) or (rank > 0 and spec.cache_aware_routing))
        _calm_garbage_collector()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_http_app(self._models, self._end)

    async def drain(self, patience_s: float) -> None:
        """The server stops: open requests may end for so long, the rest ends with an error."""
        deadline = time.monotonic() + patience_s
        while self._models.num_open and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        self._models.stop()
        await asyncio.sleep(DRAIN_POLL_S)  # the error events are on their way

    async def _end(self) -> None:
        """Serve stops this replica, whose own requests have ended."""
        await wait_for_guests(self._member, self._own)
        self._models.stop()


@serve.deployment(**SETTINGS)
class EngineReplica(_Replica):
    """Of a further model: one engine group, which LLMReplicas use."""

    async def __init__(self, spec: ModelSpec) -> None:  # type: ignore[misc]
        await self._start(spec)
        self._meet_others(self._engines, starts_directory=True)
        _calm_garbage_collector()

    async def __del__(self) -> None:
        """Serve awaits it where it stops a replica."""
        await wait_for_guests(self._member, self._own)
        self._engines.stop()


async def _start_group(config: EngineConfig) -> "EngineGroup":
    # Not at the top: Serve imports this module to build the application, and torch and
    # transformers would cost that process 4 s.
    from engine.ray_group import EngineGroup

    return await EngineGroup.start(config)


def _engines(
    spec: ModelSpec,
    version: str,
    metrics: Metrics,
    *,
    own: AsyncEngine | None = None,
    handle: DeploymentHandle[Any] | None = None,
) -> Engines:
    from engine.ray_remote import RemoteGroup, reference

    return Engines(
        replica_id=serve.get_replica_context().replica_tag,
        version=version,
        config=spec.config,
        metrics=metrics,
        join=RemoteGroup,
        refer=reference,
        own=own,
        attach=None if handle is None else partial(_attach, handle),
    )


async def _attach(handle: DeploymentHandle[Any]) -> Entry:
    """Serve chooses the replica, and starts one where there is none."""
    entry: Entry = await handle.attach.remote()
    return entry


async def _other_model(
    spec: ModelSpec, created: int, handle: DeploymentHandle[Any], tracer: RequestTracer | None
) -> OtherModel:
    version = await asyncio.to_thread(version_of, spec.config)
    context = await asyncio.to_thread(read_context, spec.config)
    metrics = Metrics(spec.name, context.session_len)
    engines = _engines(spec, version, metrics, handle=handle)
    return OtherModel(spec, created, engines, metrics, context, tracer)


def _calm_garbage_collector() -> None:
    """Leave out the 150k objects of the start, and collect new ones less often.

    Each collection stops all streams: while a body of 2 MiB of empty lists was read they took
    0.8 s, then 0.1 s without the old objects, and 10 ms with a threshold of 50,000.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
