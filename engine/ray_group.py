"""The engine as Ray actors: one EngineActor per rank, and EngineGroup, its owner's handle.

Rank 0 holds the RequestBatcher; ranks 1 and up follow it over the process group, so that a step
costs no Ray call. The owner (a Serve replica) exchanges requests and outputs with rank 0 only,
and keeps one parked call on every rank, which fails the moment that rank dies.
"""

import asyncio
import logging
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.batcher import RequestBatcher
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineDeadError, MantaError
from engine.executor import EngineInfo
from engine.outputs import EngineStats, SequenceOutput
from engine.ray_weights import RayPeers
from engine.sequence import EngineRequest

if TYPE_CHECKING:
    from engine.parallel import ParallelGroup
    from engine.worker import Worker

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 30  # takes about 1 ms, but Python code may keep a process busy

Actor: TypeAlias = "ActorHandle[EngineActor]"


class EngineActor:
    """One rank. Async, so that submit, abort and a waiting poll interleave; threads compute."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._batcher: RequestBatcher | None = None
        self._has_output = asyncio.Event()

    async def address(self) -> str:
        """A host:port of this rank's node on which the group can meet."""
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    async def start(self, address: str) -> EngineInfo | None:
        """Meet the other ranks, load the weights, start the loop. Rank 0 returns the info."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self._start, address, loop)

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

    def _start(self, address: str, loop: asyncio.AbstractEventLoop) -> EngineInfo | None:
        # Not at the top: the owner imports this module too, and torch costs it 1.5 s.
        from engine.local_executor import LocalExecutor
        from engine.parallel import ParallelGroup
        from engine.worker import Worker, resolve_device

        config = self._config
        peers = RayPeers.of(config)
        device = resolve_device(config.device)
        group = ParallelGroup.join(self._rank, config.tp, address, device)
        if self._rank > 0:
            worker = Worker(config, group, peers)
            threading.Thread(target=_follow, args=(worker, group), daemon=True).start()
            return None
        engine = Engine(config, LocalExecutor(config, group, peers))
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

        In a placement group the caller sits in bundle 0 and rank r takes all of bundle r + 1.
        Raises the first rank's error (ConfigError, CheckpointError, …) with all actors gone.
        """
        actors = [_create(config, rank) for rank in range(config.tp)]
        try:
            address = await _reply(actors[0].address.remote())
            infos = await asyncio.gather(
                *[_reply(actor.start.remote(address), rank) for rank, actor in enumerate(actors)]
            )
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


def _create(config: EngineConfig, rank: int) -> Actor:
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
    placement = get_current_placement_group()
    if placement is not None:
        bundle = placement.bundle_specs[rank + 1]
        options = {
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement, placement_group_bundle_index=rank + 1
            ),
        }
    elif config.device != "cpu":
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        options["num_gpus"] = int(resources.get("GPU", 0) >= config.tp)
    actor: Any = ray.remote(EngineActor)
    handle: Actor = actor.options(**options).remote(config, rank)
    return handle


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


def _follow(worker: "Worker", group: "ParallelGroup") -> None:
    """Compute what rank 0 sends; a fault ends the process, which the owner's parked call sees."""
    from engine.local_executor import follow

    try:
        follow(worker, group)
    except Exception:
        logger.exception("rank %d failed", group.rank)
        os._exit(1)


def _notify(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of another thread's loop; once per step, so the cost is one wake-up."""
    loop.call_soon_threadsafe(event.set)
