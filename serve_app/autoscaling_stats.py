"""LoadMeter: what a replica tells the autoscaling policy, from its engine's last numbers.

Knows neither Serve nor how replicas are counted.
"""

import math

from engine.outputs import EngineStats
from serve_app.autoscaling import ReplicaLoad

MEMORY_S = 10.0  # older measurements fade: the mix of requests changes
ENOUGH_S = 1.0  # measured for less, a rate says little


class LoadMeter:
    """Measures how fast the engine takes sequences in while more of them wait."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._last = EngineStats()
        self._last_time = 0.0
        self._seconds = self._sequences = self._tokens = 0.0  # faded sums

    def read(self, stats: EngineStats, num_open: int, now: float) -> ReplicaLoad:
        """`num_open` counts what is on its way to the engine as well, or waits for another one.

        `now` is on the clock of EngineRequest.arrival_time. Call it at regular times: rates are
        taken from one call to the next.
        """
        self._measure(stats, now)
        running = min(stats.num_running, num_open)
        measured = self._seconds >= ENOUGH_S
        return ReplicaLoad(
            running=running,
            waiting=num_open - running,
            waiting_tokens=stats.num_waiting_tokens,
            oldest_waiting_s=stats.oldest_waiting_s,
            slots=self._slots,
            kv_cache_usage=stats.kv_cache_usage,
            drained_per_s=self._sequences / self._seconds if measured else 0.0,
            drained_tokens_per_s=self._tokens / self._seconds if measured else 0.0,
        )

    def _measure(self, stats: EngineStats, now: float) -> None:
        last, seconds = self._last, now - self._last_time
        self._last, self._last_time = stats, now
        waited = last.num_waiting and stats.num_waiting
        if not waited or seconds <= 0 or stats.num_steps < last.num_steps:
            return  # or the clock was set, or another engine counts from zero
        kept = math.exp(-seconds / MEMORY_S)
        self._seconds = self._seconds * kept + seconds
        self._sequences = self._sequences * kept + stats.num_admitted - last.num_admitted
        tokens = stats.num_prompt_tokens - last.num_prompt_tokens
        self._tokens = self._tokens * kept + tokens
