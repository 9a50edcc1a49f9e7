"""RemoteGroup: another replica's engine, used as one of its consumers.

It looks like an EngineGroup, except that stopping it only leaves: the engine belongs to the
replica that started it, and ends with that one.
"""

import asyncio
from dataclasses import dataclass
from uuid import uuid4

from engine.executor import EngineInfo
from engine.outputs import EngineStats, SequenceOutput
from engine.ray_group import Actor, EngineGroup, reply
from engine.sequence import EngineRequest


@dataclass(frozen=True, slots=True)
class EngineRef:
    """Where an engine can be joined. Equal for as long as it is the same engine."""

    id: str
    rank_0: Actor
    info: EngineInfo


def reference(group: EngineGroup) -> EngineRef:
    """What other replicas need to join a group."""
    return EngineRef(group.engine_id, group.rank_0, group.info)


class RemoteGroup(EngineGroup):
    """An engine that several replicas use. A poll that fails tells of its death.

    Until `is_joined` it may have been dead before.
    """

    def __init__(self, engine: EngineRef) -> None:
        super().__init__([engine.rank_0], engine.info)
        self.consumer = uuid4().hex
        self.is_joined = False
        self._entering = asyncio.ensure_future(reply(engine.rank_0.enter.remote(self.consumer)))
        self._entering.add_done_callback(self._on_entered)

    # The first calls to an actor can overtake each other: seen of submit, which was refused.

    async def submit(self, requests: list[EngineRequest], *, admitted: bool = False) -> None:
        await asyncio.shield(self._entering)
        await super().submit(requests, admitted=admitted)

    async def abort(self, request_ids: list[str]) -> None:
        await asyncio.shield(self._entering)
        await super().abort(request_ids)

    async def poll(self) -> tuple[list[SequenceOutput], EngineStats]:
        await asyncio.shield(self._entering)
        return await super().poll()

    def _on_entered(self, entering: "asyncio.Task[None]") -> None:
        self.is_joined = not entering.cancelled() and entering.exception() is None

    def stop(self) -> None:
        """Leave: what is open ends there, and nobody else's sequences are touched."""
        self._death.cancel()
        self._actors[0].leave.remote(self.consumer)
