"""The directory: which replicas there are, how busy their engines are, and what they have cached.

One actor per application, which any replica may start and which ends with that one: it holds
nothing that the replicas do not tell again within INTERVAL_S. A replica that is alone has none.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

if TYPE_CHECKING:
    from engine.ray_remote import EngineRef

logger = logging.getLogger("ray.serve")

INTERVAL_S = 0.5  # between two exchanges, each about 1 ms of a core and 20 KB per replica
ALONE_S = 5.0  # between a lone replica's looks whether others have started a directory
EXPIRY_S = 5.0  # an entry that was not repeated: a replica that is gone, or held up
FORGOTTEN_S = 1.0  # behind an exchange of all others, and what they had sent until then
CALL_S = 5.0
NAMESPACE = "serve"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a replica tells of its engine."""

    replica_id: str
    model: str
    version: str  # engines of another one give other answers
    engine: "EngineRef | None"  # None while another one is started
    num_sequences: int  # running and waiting
    num_waiting_tokens: int
    prefixes: list[int]  # short hashes, engine.prefix


class Directory:
    """The actor."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, Entry]] = {}  # by replica, with its time

    def exchange(self, entry: Entry) -> list[Entry]:
        """Take in one replica's entry; returns those of all others."""
        now = time.monotonic()
        self._entries = {
            replica_id: (told, each)
            for replica_id, (told, each) in self._entries.items()
            if now - told < EXPIRY_S
        }
        self._entries[entry.replica_id] = (now, entry)
        return [each for _, each in self._entries.values() if each.replica_id != entry.replica_id]

    def leave(self, replica_id: str) -> None:
        self._entries.pop(replica_id, None)


class Member:
    """A replica's part: tells and hears every INTERVAL_S. Create it inside the running loop.

    `starts` says whether to start the directory where there is none.
    """

    def __init__(
        self,
        app_name: str,
        *,
        starts: bool,
        describe: Callable[[], Awaitable[Entry]],
        on_others: Callable[[list[Entry]], None],
    ) -> None:
        self._name = f"manta-directory:{app_name}"
        self._starts = starts
        self._describe = describe
        self._on_others = on_others
        self._directory: Any = None
        self._replica_id: str | None = None
        self._left_at: float | None = None
        self._start()

    def leave(self) -> None:
        """Tell the others that this replica's engine will end."""
        self._task.cancel()
        if self._directory is not None and self._replica_id is not None and not self._left_at:
            self._left_at = time.monotonic()
            self._directory.leave.remote(self._replica_id)

    async def forgotten(self) -> None:
        """Until nobody sends requests to the engine any more. leave() comes first."""
        if self._left_at is not None:
            await asyncio.sleep(self._left_at + FORGOTTEN_S - time.monotonic())

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._on_end)

    def _on_end(self, task: "asyncio.Task[None]") -> None:
        """Without its part a replica is alone: whatever the fault was, it takes it up again."""
        if not task.cancelled():
            logger.error("the exchange with other replicas failed", exc_info=task.exception())
            task.get_loop().call_later(ALONE_S, self._start)

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(CALL_S):
                    self._on_others(await self._exchange())
            except (RayError, TimeoutError) as error:
                logger.info("the directory is gone: %r", error)
                self._directory = None
                self._on_others([])
            await asyncio.sleep(INTERVAL_S if self._directory is not None else ALONE_S)

    async def _exchange(self) -> list[Entry]:
        if self._directory is None:
            self._directory = await asyncio.to_thread(self._find)
        if self._directory is None:
            return []
        entry = await self._describe()
        self._replica_id = entry.replica_id
        others: list[Entry] = await self._directory.exchange.remote(entry)
        return others

    def _find(self) -> Any:
        """The actor's handle, None when nobody has started it."""
        if self._starts:
            actor: Any = ray.remote(Directory)
            options = {"name": self._name, "namespace": NAMESPACE, "get_if_exists": True}
            return actor.options(num_cpus=0, max_concurrency=1, **options).remote()
        try:
            return ray.get_actor(self._name, NAMESPACE)
        except ValueError:
            return None
