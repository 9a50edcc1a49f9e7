"""EngineActor: the Ray actor of one rank.

Rank 0 holds the RequestBatcher and answers the consumers; ranks 1 and up follow it over the
process group. engine/ray_group.py starts and owns them.
"""

import asyncio
import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from engine.batcher import RequestBatcher
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.executor import EngineInfo
from engine.outboxes import OWNER
from engine.outputs import EngineStats, SequenceOutput
from engine.pollers import Pollers
from engine.ray_weights import RayPeers
from engine.sequence import EngineRequest

if TYPE_CHECKING:
    from engine.parallel import ParallelGroup
    from engine.worker import AnyWorker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankInfo:
    """What a rank knows once its process runs."""

    node: str
    device: str
    address: str  # host:port where rank 0 of several listens; empty for the others


class EngineActor:
    """One rank. Async, so that submit, abort and a waiting poll interleave; threads compute."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._group: ParallelGroup | None = None  # None: this rank is the only one
        self._listener: socket.socket | None = None
        self._batcher: RequestBatcher | None = None
        self._pollers = Pollers(lambda consumer: self._running().leave(consumer))

    async def prepare(self) -> RankInfo:
        """Import what takes long, and find this rank's device and, for rank 0, its address."""
        return await asyncio.get_running_loop().run_in_executor(None, self._prepare)

    async def join(self, address: str, num_neighbours: int) -> None:
        """Meet the other ranks; `num_neighbours` of them, this one included, share its node."""
        await asyncio.get_running_loop().run_in_executor(None, self._join, address, num_neighbours)

    async def start(self) -> EngineInfo | None:
        """Load the weights, start the loop. Rank 0 returns the info."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self._start, loop)

    async def enter(self, consumer: str) -> None:
        """Another replica will submit and poll."""
        self._running().enter(consumer)
        self._pollers.enter(consumer)

    async def leave(self, consumer: str) -> None:
        """End what a consumer has open; one that is gone is ignored."""
        if self._pollers.leave(consumer):
            self._running().leave(consumer)

    async def submit(
        self, requests: list[EngineRequest], admitted: bool = False, consumer: str = OWNER
    ) -> None:
        self._pollers.check(consumer)
        self._running().submit(requests, consumer=consumer, admitted=admitted)

    async def abort(self, request_ids: list[str], consumer: str = OWNER) -> None:
        self._running().abort(request_ids, consumer=consumer)

    async def poll(self, consumer: str = OWNER) -> tuple[list[SequenceOutput], EngineStats]:
        """Wait until something was produced for this consumer, then return all of it."""
        await self._pollers.wait(consumer)
        return self._running().take(consumer)

    async def prefixes(self) -> list[int]:
        """Short hashes of the prefixes in the cache, those used last first."""
        return self._running().prefixes()

    async def check(self) -> None:
        self._running().check()

    async def park(self) -> None:
        """Never returns: a caller waiting on it learns of this process's death at once."""
        await asyncio.Event().wait()

    def _running(self) -> RequestBatcher:
        assert self._batcher is not None, "start() comes first, on rank 0"
        return self._batcher

    def _prepare(self) -> RankInfo:
        # Not at the top: the owner imports this module too, and torch costs it 1.5 s.
        from engine.parallel import listen
        from engine.rank_model import resolve_device

        context = ray.get_runtime_context()
        address = ""
        if self._rank == 0 and self._config.num_ranks > 1:
            host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            try:
                # Kept open until the ranks meet: nobody else can take the port.
                self._listener = listen(host)
            except OSError as error:
                raise ConfigError(
                    f"rank 0 cannot listen at {host}, by which Ray knows this node: {error}; give "
                    "ray start --node-ip-address an address that this machine has"
                ) from error
            host, port = self._listener.getsockname()[:2]
            address = f"{host}:{port}"
        return RankInfo(context.get_node_id(), resolve_device(self._config.device), address)

    def _join(self, address: str, num_neighbours: int) -> None:
        from engine.parallel import ParallelGroup
        from engine.rank_model import resolve_device, tensor_device

        config = self._config
        self._group = ParallelGroup.join(
            self._rank,
            config.tp,
            address,
            tensor_device(resolve_device(config.device)),
            pp=config.pp,
            listener=self._listener,
            num_neighbours=num_neighbours,
        )

    def _start(self, loop: asyncio.AbstractEventLoop) -> EngineInfo | None:
        from engine.local_executor import LocalExecutor
        from engine.parallel import ParallelGroup
        from engine.pipeline import PipelineExecutor
        from engine.worker import make_worker

        config, group = self._config, self._group or ParallelGroup()
        peers = RayPeers.of(config)
        if self._rank > 0:
            worker = make_worker(config, group, peers)
            threading.Thread(target=_follow, args=(config, worker, group), daemon=True).start()
            return None
        make = LocalExecutor if config.pp == 1 else PipelineExecutor
        engine = Engine(config, make(config, group, peers))
        self._batcher = RequestBatcher(
            engine,
            max_waiting_requests=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
            step_timeout_s=config.step_timeout_s,
            # Once per step, so the cost is one wake-up.
            on_output=lambda consumers: loop.call_soon_threadsafe(self._pollers.wake, consumers),
        )
        return engine.info


def _follow(config: EngineConfig, worker: "AnyWorker", group: "ParallelGroup") -> None:
    """Compute what rank 0 sends; a fault ends the process, which the owner's parked call sees."""
    from engine.local_executor import follow
    from engine.pipeline import follow_stage

    try:
        if config.pp == 1:
            follow(worker, group)
        else:
            follow_stage(config, worker, group)
    except Exception:
        logger.exception("rank %d failed", group.global_rank)
        os._exit(1)
