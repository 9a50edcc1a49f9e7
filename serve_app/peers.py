"""Peer: what one replica knows of another one's engine, as routing weighs it.

Knows no engine and no Ray.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.directory import Entry
from serve_app.routing import Candidate

if TYPE_CHECKING:
    from engine.ray_remote import EngineRef

REPORTS = 3  # what was sent may be missing in so many reports: in work, on its way, told late


@dataclass(slots=True)
class Load:
    num_sequences: int = 0
    num_waiting_tokens: int = 0


class Peer:
    """A replica's last entry, and what is known better: this replica's own share of its load."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self._known: set[int] = set()
        self._recent: deque[set[int]] = deque([set()], maxlen=REPORTS)
        self.engine: EngineRef | None = None
        self.others = Load()  # what other replicas have there; below zero when told late

    def hear(self, entry: Entry, mine: Load) -> None:
        self.engine = entry.engine
        self.others = Load(
            entry.num_sequences - mine.num_sequences,
            entry.num_waiting_tokens - mine.num_waiting_tokens,
        )
        self._known = set(entry.prefixes).union(*self._recent)
        self._recent.append(set())

    def sent(self, hashes: Sequence[int]) -> None:
        self._known.update(hashes)
        self._recent[-1].update(hashes)

    def candidate(self, mine: Load) -> Candidate:
        return Candidate(
            self.replica_id,
            max(0, self.others.num_sequences + mine.num_sequences),
            max(0, self.others.num_waiting_tokens + mine.num_waiting_tokens),
            self._known,
        )
