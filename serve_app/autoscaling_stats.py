"""LoadMeter: what a replica tells the autoscaling policy, from its engine's last numbers.

Knows neither Serve nor how replicas are counted.
"""

import math

from engine.outputs import EngineStats
from serve_app.autoscaling import ReplicaLoad

ARRIVALS_S = 5.0  # arrivals are averaged over about so long
MEMORY_S = 10.0  # as is what was drained: the mix of requests changes
ENOUGH_S = 2.0  # measured for less, a rate says little
FORGET_S = 600.0  # since anything waited
WAIT_S = 0.5  # less than this may be a step that lasts, or one prompt behind another


class LoadMeter:
    """Measures what arrives, and how fast the engine takes it in while more of it waits."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._last = EngineStats()
        self._last_time: float | None = None
        self._waited = False
        self._arrived_per_s = 0.0
        self._measured_at = -math.inf
        self._seconds = self._sequences = self._tokens = 0.0  # faded sums
        self._drained = (0.0, 0.0)  # sequences and prompt tokens per second

    def read(self, stats: EngineStats, num_open: int, now: float) -> ReplicaLoad:
        """`num_open` counts what is on its way to the engine as well, or waits for another one.

        `now` is in seconds. Call it at regular times: rates are taken from one call to the next.
        """
        self._measure(stats, now)
        running = min(stats.num_running, num_open)
        known = now - self._measured_at < FORGET_S
        drained_per_s, drained_tokens_per_s = self._drained if known else (0.0, 0.0)
        return ReplicaLoad(
            running=running,
            waiting=num_open - running,
            waiting_tokens=stats.num_waiting_tokens,
            slots=self._slots,
            arrived_per_s=self._arrived_per_s,
            drained_per_s=drained_per_s,
            drained_tokens_per_s=drained_tokens_per_s,
        )

    def _measure(self, stats: EngineStats, now: float) -> None:
        last, last_time, had_waited = self._last, self._last_time, self._waited
        self._last, self._last_time = stats, now
        self._waited = stats.oldest_waiting_s > WAIT_S
        if last_time is None or now <= last_time or stats.num_steps < last.num_steps:
            return  # the first call, or the clock was set, or another engine counts from zero
        seconds = now - last_time
        arrived = stats.num_arrived - last.num_arrived
        share = -math.expm1(-seconds / ARRIVALS_S)
        self._arrived_per_s += share * (arrived / seconds - self._arrived_per_s)
        if not had_waited or not self._waited:
            return
        kept = math.exp(-(now - self._measured_at) / MEMORY_S)
        self._measured_at = now
        self._seconds = self._seconds * kept + seconds
        # Not those admitted: free slots fill at once, and say nothing of what comes after.
        admitted = stats.num_admitted - last.num_admitted
        ended = admitted - (stats.num_running - last.num_running)
        self._sequences = self._sequences * kept + ended
        tokens = stats.num_prompt_tokens - last.num_prompt_tokens
        self._tokens = self._tokens * kept + tokens
        if self._seconds >= ENOUGH_S:
            drained = max(0.0, self._sequences), self._tokens
            self._drained = drained[0] / self._seconds, drained[1] / self._seconds
