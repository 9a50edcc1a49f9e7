"""What replicas tell of their engines and know of others', as routing weighs it.

Knows no engine and no Ray.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.outputs import EngineStats
from serve_app.directory import Entry
from serve_app.open_request import Load
from serve_app.routing import Candidate

if TYPE_CHECKING:
    from engine.ray_remote import EngineRef

FADE = 0.2  # of a new report in the share of prompt tokens that are computed
REPORTS = 3  # what was sent may be missing in so many reports: in work, on its way, told late


class QueueMeter:
    """How much an engine's queue is worth telling others, who act on it for half a second."""

    def __init__(self) -> None:
        self._last = EngineStats()
        self._share = 1.0  # of prompt tokens looked up in the cache that had to be computed
        self.num_tokens = 0  # as last read

    def read(self, stats: EngineStats) -> None:
        """Count the tokens to compute of what waits now and waited last time.

        A prompt that waits for the next step only is done when others hear of it.
        """
        last, self._last = self._last, stats
        looked_up = stats.prefix_cache_queries - last.prefix_cache_queries
        if looked_up > 0:
            found = stats.prefix_cache_hits - last.prefix_cache_hits
            self._share += FADE * (1 - found / looked_up - self._share)
        waits_on = min(last.num_waiting_tokens, stats.num_waiting_tokens)
        self.num_tokens = round(self._share * waits_on)


class Peer:
    """A replica's last entry, and what is known better: this replica's own share of its load."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self._known: set[int] = set()
        self._recent: deque[set[int]] = deque([set()], maxlen=REPORTS)
        self.engine: EngineRef | None = None
        self.mine = Load()  # what this replica has there now
        self.others = Load()  # what other replicas have there; below zero when told late

    def hear(self, entry: Entry) -> None:
        self.engine = entry.engine
        self.others = Load(
            entry.num_sequences - self.mine.num_sequences,
            entry.num_waiting_tokens - self.mine.num_waiting_tokens,
        )
        self._known = set(entry.prefixes).union(*self._recent)
        self._recent.append(set())

    def sent(self, hashes: Sequence[int]) -> None:
        self._known.update(hashes)
        self._recent[-1].update(hashes)

    def candidate(self) -> Candidate:
        return Candidate(
            self.replica_id,
            max(0, self.others.num_sequences + self.mine.num_sequences),
            max(0, self.others.num_waiting_tokens + self.mine.num_waiting_tokens),
            self._known,
        )
