"""EngineGroup: the engine as Ray actors, one EngineActor per rank, and their owner's handle.

Rank 0 holds the RequestBatcher; ranks 1 and up follow it over the process group, so that a step
costs no Ray call. The ranks may be on several nodes (engine/ray_placement.py). The owner (a Serve
replica) exchanges requests and outputs with rank 0 only, and keeps one parked call on every rank,
which fails the moment that rank dies. Other replicas may use the engine as well (ray_remote.py):
each is a consumer of its own outputs.
"""

import asyncio
from collections import Counter
from typing import Any, TypeAlias

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDeadError, MantaError
from engine.executor import EngineInfo
from engine.outboxes import OWNER
from engine.outputs import EngineStats, SequenceOutput
from engine.ray_actor import EngineActor, RankInfo
from engine.ray_placement import rank_options
from engine.sequence import EngineRequest

# For a rank's process: the node of its bundle may have to be replaced. If that takes longer, the
# replica is replaced, and other replicas answer what it has not.
START_TIMEOUT_S = 120
JOIN_TIMEOUT_S = 90  # more than torch's own, which knows less
LOAD_TIMEOUT_S = 3600  # a terabyte at 300 MB/s
QUANTIZE_TIMEOUT_S = 48 * 3600  # awq searches a model of 8B for hours on a CPU
CHECK_TIMEOUT_S = 30  # takes about 1 ms, but Python code may keep a process busy

Actor: TypeAlias = "ActorHandle[EngineActor]"


class EngineGroup:
    """The owner's side of one engine group."""

    consumer = OWNER
    is_joined = True  # the engine has answered

    def __init__(self, actors: list[Actor], info: EngineInfo) -> None:
        self.info = info
        self._actors = actors
        self._death = asyncio.ensure_future(_first_death(actors))

    @property
    def rank_0(self) -> Actor:
        return self._actors[0]

    @property
    def engine_id(self) -> str:
        """The same in whoever uses this engine, and no other engine's."""
        return str(self.rank_0._actor_id.hex())

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
            infos = await _all(
                [actor.start.remote() for actor in actors],
                LOAD_TIMEOUT_S if config.quantize is None else QUANTIZE_TIMEOUT_S,
                EngineDeadError(
                    "did not load; a rank that has waits for the others, so look at what reads "
                    f"{config.model} or {config.weights_cache_directory()}"
                ),
            )
        except BaseException:
            _kill(actors)
            raise
        return cls(actors, infos[0])

    async def submit(self, requests: list[EngineRequest], *, admitted: bool = False) -> None:
        """Queue requests; what is wrong with one of them arrives as its output.

        No bound of the queue refuses `admitted` ones, which a dead engine had taken in.
        """
        await reply(self._actors[0].submit.remote(requests, admitted, self.consumer))

    async def abort(self, request_ids: list[str]) -> None:
        """End these requests; ids that are unknown or done are ignored."""
        await reply(self._actors[0].abort.remote(request_ids, self.consumer))

    async def poll(self) -> tuple[list[SequenceOutput], EngineStats]:
        """Everything produced since the last call; waits until there is something.

        EngineDeadError when the loop failed or any rank died, also while waiting.
        """
        poll = asyncio.ensure_future(reply(self._actors[0].poll.remote(self.consumer)))
        try:
            await asyncio.wait({poll, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if poll.done():
                return poll.result()
            raise self._death.result()
        finally:
            poll.cancel()

    async def prefixes(self) -> list[int]:
        """Short hashes of the prefixes in the cache, those used last first."""
        prefixes: list[int] = await reply(self._actors[0].prefixes.remote())
        return prefixes

    async def check(self) -> None:
        """EngineDeadError when an actor died, the loop failed, a step or rank 0 itself hangs."""
        if self._death.done():
            raise self._death.result()
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await reply(self._actors[0].check.remote())
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


async def _all(refs: list[Any], timeout_s: float, late: Exception) -> list[Any]:
    """Every rank's reply, or the first error; `late`, with the ranks' numbers, when it is time."""
    calls = [asyncio.ensure_future(reply(ref, rank)) for rank, ref in enumerate(refs)]
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.gather(*calls)
    except TimeoutError as error:
        names = ", ".join(str(rank) for rank, call in enumerate(calls) if call.cancelled())
        raise type(late)(f"engine rank {names} {late} (waited {timeout_s:g} s)") from error


async def reply(ref: Any, rank: int = 0) -> Any:
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
    except RayError as error:
        reason = f"no answer from engine rank {rank}: {type(error).__name__}: {error}"
        raise EngineDeadError(reason) from error


async def _first_death(actors: list[Actor]) -> EngineDeadError:
    """Resolves when a rank dies: its parked call ends with the reason."""
    parked = [
        asyncio.ensure_future(reply(actor.park.remote(), rank)) for rank, actor in enumerate(actors)
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
