"""RemoteGroup: another replica's engine, used as one of its consumers.

It looks like an EngineGroup, except that stopping it only leaves: the engine belongs to the
replica that started it, and ends with that one.
"""

from dataclasses import dataclass
from uuid import uuid4

from engine.executor import EngineInfo
from engine.ray_group import Actor, EngineGroup


@dataclass(frozen=True, slots=True)
class EngineRef:
    """Where an engine can be joined. Equal for as long as it is the same engine."""

    id: str
    rank_0: Actor
    info: EngineInfo


def reference(group: EngineGroup) -> EngineRef:
    """What other replicas need to join a group."""
    rank_0 = group.rank_0
    return EngineRef(rank_0._actor_id.hex(), rank_0, group.info)


class RemoteGroup(EngineGroup):
    """An engine that several replicas use. A poll that fails tells of its death."""

    def __init__(self, engine: EngineRef) -> None:
        super().__init__([engine.rank_0], engine.info)
        self.consumer = uuid4().hex
        # No answer is awaited: calls of a few bytes, as this one, are not overtaken. If it were,
        # the first call would fail, and with it this engine, for this replica alone.
        engine.rank_0.enter.remote(self.consumer)

    def stop(self) -> None:
        """Leave: what is open ends there, and nobody else's sequences are touched."""
        self._death.cancel()
        self._actors[0].leave.remote(self.consumer)
