"""The engine as Ray actors: one EngineActor per rank, and EngineGroup, its owner's handle.

Rank 0 holds the RequestBatcher; ranks 1 and up follow it over the process group, so that a step
costs no Ray call. The ranks may be on several nodes (engine/ray_placement.py). The owner (a Serve
replica) exchanges requests and outputs with rank 0 only, and keeps one parked call on every rank,
which fails the moment that rank dies.
"""

import asyncio
import logging
import os
import socket
import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from engine.batcher import RequestBatcher
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, EngineDeadError, MantaError
from engine.executor import EngineInfo
from engine.outputs import EngineStats, SequenceOutput
from engine.ray_placement import rank_options
from engine.ray_weights import RayPeers
from engine.sequence import EngineRequest

if TYPE_CHECKING:
    from engine.parallel import ParallelGroup
    from engine.worker import Worker

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600  # for a rank's process: the node of its bundle may have to be replaced
JOIN_TIMEOUT_S = 90  # more than torch's own, which knows less
CHECK_TIMEOUT_S = 30  # takes about 1 ms, but Python code may keep a process busy

Actor: TypeAlias = "ActorHandle[EngineActor]"


@dataclass(frozen=True, slots=True)
class RankInfo:
    """What a rank knows once its process runs."""

    node: str
    device: str
    address: str  # host:port where rank 0 listens; empty for the others


class EngineActor:
    """One rank. Async, so that submit, abort and a waiting poll interleave; threads compute."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._group: ParallelGroup | None = None  # None: this rank is the only one
        self._listener: socket.socket | None = None
        self._batcher: RequestBatcher | None = None
        self._has_output = asyncio.Event()

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

    async def submit(self, requests: list[EngineRequest], admitted: bool = False) -> None:
        self._running().submit(requests, admitted=admitted)

    async def abort(self, request_ids: list[str]) -> None:
        self._running().abort(request_ids)

    async def poll(self) -> tuple[list[SequenceOutput], EngineStats]:
        """Wait until something was produced, then return all of it."""
        await self._has_output.wait()
        self._has_output.clear()
        return self._running().take()

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
        from engine.worker import resolve_device

        context = ray.get_runtime_context()
        address = ""
        if self._rank == 0:
            # Kept open until the ranks meet: nobody else can take the port.
            self._listener = listen(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
            host, port = self._listener.getsockname()[:2]
            address = f"{host}:{port}"
        return RankInfo(context.get_node_id(), resolve_device(self._config.device), address)

    def _join(self, address: str, num_neighbours: int) -> None:
        from engine.parallel import ParallelGroup
        from engine.worker import resolve_device

        config = self._config
        self._config = replace(config, num_threads=config.threads_per_rank(num_neighbours))
        device = resolve_device(config.device)
        self._group = ParallelGroup.join(
            self._rank, config.tp, address, device, pp=config.pp, listener=self._listener
        )

    def _start(self, loop: asyncio.AbstractEventLoop) -> EngineInfo | None:
        from engine.local_executor import LocalExecutor
        from engine.parallel import ParallelGroup
        from engine.pipeline import PipelineExecutor
        from engine.worker import Worker

        config, group = self._config, self._group or ParallelGroup()
        peers = RayPeers.of(config)
        if self._rank > 0:
            worker = Worker(config, group, peers)
            threading.Thread(target=_follow, args=(config, worker, group), daemon=True).start()
            return None
        make = LocalExecutor if config.pp == 1 else PipelineExecutor
        engine = Engine(config, make(config, group, peers))
        self._batcher = RequestBatcher(
            engine,
            max_waiting_requests=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
            step_timeout_s=config.step_timeout_s,
            on_output=lambda: _notify(loop, self._has_output),
        )
        return engine.info


class EngineGroup:
    """The owner's side of one engine group."""

    def __init__(self, actors: list[Actor], info: EngineInfo) -> None:
        self.info = info
        self._actors = actors
        self._death = asyncio.ensure_future(_first_death(actors))

    @classmethod
    async def start(cls, config: EngineConfig) -> "EngineGroup":
        """Create the actors and load the model.

        In a placement group the caller sits in bundle 0 and the ranks take equal parts of all
        others, always the same while those stay where they are.
        Raises the first rank's error (ConfigError, CheckpointError, …) with all actors gone.
        """
        actors = await _create(config)
        try:
            ranks = await _all(
                [actor.prepare.remote() for actor in actors],
                START_TIMEOUT_S,
                TimeoutError("did not start; its node may be gone, or out of memory"),
            )
            _check_devices(ranks)
            neighbours = Counter(rank.node for rank in ranks)
            await _all(
                [
                    actor.join.remote(ranks[0].address, neighbours[rank.node])
                    for actor, rank in zip(actors, ranks, strict=True)
                ],
                JOIN_TIMEOUT_S,
                EngineDeadError(
                    f"did not meet the others, who wait at {ranks[0].address}; do the nodes reach "
                    "each other's ports? GLOO_SOCKET_IFNAME names the network interface to use"
                ),
            )
            infos = await _all([actor.start.remote() for actor in actors])
        except BaseException:
            _kill(actors)
            raise
        return cls(actors, infos[0])

    async def submit(self, requests: list[EngineRequest], *, admitted: bool = False) -> None:
        """Queue requests; what is wrong with one of them arrives as its output.

        No bound of the queue refuses `admitted` ones, which a dead engine had taken in.
        """
        await _reply(self._actors[0].submit.remote(requests, admitted))

    async def abort(self, request_ids: list[str]) -> None:
        """End these requests; ids that are unknown or done are ignored."""
        await _reply(self._actors[0].abort.remote(request_ids))

    async def poll(self) -> tuple[list[SequenceOutput], EngineStats]:
        """Everything produced since the last call; waits until there is something.

        EngineDeadError when the loop failed or any rank died, also while waiting.
        """
        poll = asyncio.ensure_future(_reply(self._actors[0].poll.remote()))
        try:
            await asyncio.wait({poll, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if poll.done():
                return poll.result()
            raise self._death.result()
        finally:
            poll.cancel()

    async def check(self) -> None:
        """EngineDeadError when an actor died, the loop failed, a step or rank 0 itself hangs."""
        if self._death.done():
            raise self._death.result()
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await _reply(self._actors[0].check.remote())
        except TimeoutError:
            raise EngineDeadError(f"engine rank 0 gave no sign for {CHECK_TIMEOUT_S} s") from None

    def stop(self) -> None:
        """End the actors at once; nothing they hold outlives them."""
        self._death.cancel()
        _kill(self._actors)


async def _create(config: EngineConfig) -> list[Actor]:
    actor: Any = ray.remote(EngineActor)
    options = await rank_options(config)
    return [actor.options(**each).remote(config, rank) for rank, each in enumerate(options)]


def _check_devices(ranks: list[RankInfo]) -> None:
    if len({rank.device for rank in ranks}) > 1:
        found = ", ".join(f"rank {number}: {rank.device}" for number, rank in enumerate(ranks))
        raise ConfigError(f"the ranks have different devices ({found}); set device: cpu or cuda")


async def _all(
    refs: list[Any], timeout_s: float | None = None, late: Exception | None = None
) -> list[Any]:
    """Every rank's reply, or the first error; `late`, with the ranks' numbers, when it is time."""
    calls = [asyncio.ensure_future(_reply(ref, rank)) for rank, ref in enumerate(refs)]
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.gather(*calls)
    except TimeoutError as error:
        assert late is not None
        names = ", ".join(str(rank) for rank, call in enumerate(calls) if call.cancelled())
        raise type(late)(f"engine rank {names} {late} (waited {timeout_s:g} s)") from error


async def _reply(ref: Any, rank: int = 0) -> Any:
    """The result of a call to a rank, or the engine's own error, or EngineDeadError.

    Ray's report (process, exit type, last words) is that error's cause.
    """
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, MantaError):
            raise error.cause from error
        reason = f"engine rank {rank} failed: {type(error.cause).__name__}: {error.cause}"
        raise EngineDeadError(reason) from error
    except RayActorError as error:
        raise EngineDeadError(f"engine rank {rank} died") from error


async def _first_death(actors: list[Actor]) -> EngineDeadError:
    """Resolves when a rank dies: its parked call ends with the reason."""
    parked = [
        asyncio.ensure_future(_reply(actor.park.remote(), rank))
        for rank, actor in enumerate(actors)
    ]
    try:
        done, _ = await asyncio.wait(parked, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for call in parked:
            call.cancel()
    death = done.pop().exception()
    assert isinstance(death, EngineDeadError)
    return death


def _kill(actors: list[Actor]) -> None:
    for actor in actors:
        ray.kill(actor)


def _follow(config: EngineConfig, worker: "Worker", group: "ParallelGroup") -> None:
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


def _notify(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of another thread's loop; once per step, so the cost is one wake-up."""
    loop.call_soon_threadsafe(event.set)
