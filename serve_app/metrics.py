"""Metrics: the engine's and the requests' numbers under vLLM's names, through Ray's exporter.

Ray adds the prefix `ray_` and, to counters, `_total`, so `vllm_num_requests_running` appears as
`ray_vllm_num_requests_running`, which Ray's and vLLM's dashboards know. Recording one value
costs about 4 µs (measured), so the engine's numbers are recorded at most every INTERVAL_S, and
of the latencies between tokens a bounded, evenly spaced sample.

Ray's exporter counts every value of a histogram as the middle of its bucket, so a histogram's
`_sum` is off by up to half a bucket (0.15 s for a request of 1 ms). Exact means therefore come from
the counter of seconds by part.
"""

import asyncio
import time
from collections import defaultdict
from typing import Any, Literal, TypeAlias

from ray.serve.metrics import Counter, Gauge, Histogram

from engine.outputs import EngineStats, SequenceOutput

INTERVAL_S = 0.1  # Ray exports every 10 s
REFRESH_S = 5.0  # Ray forgets a gauge that was not set between two exports
MAX_SAMPLES = 100  # inter-token latencies recorded per interval: 0.4 % of a core
LABELS: Any = ("model_name", "engine")  # Any: Ray annotates tag_keys as tuples of one
REASON, PART = "finished_reason", "part"
Part: TypeAlias = Literal["framework", "queue", "prefill", "decode"]

# vLLM's bucket borders, seconds.
# fmt: off
TTFT_S = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
]
TOKEN_S = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
]
REQUEST_S = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
]
# fmt: on
PART_S = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, *REQUEST_S]  # finer than vLLM's
ITERATION_TOKENS = [1.0, *(float(2**power) for power in range(3, 15))]

_GAUGES = {
    "num_running": ("vllm_num_requests_running", "Sequences running in the engine."),
    "num_waiting": ("vllm_num_requests_waiting", "Sequences waiting in the engine."),
    "kv_cache_usage": ("vllm_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."),
}
_COUNTERS = {
    "prefix_cache_queries": ("vllm_prefix_cache_queries", "Tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("vllm_prefix_cache_hits", "Tokens found in the prefix cache."),
    "num_preemptions": ("vllm_num_preemptions", "Sequences preempted."),
    "num_prompt_tokens": ("vllm_prompt_tokens", "Prompt tokens taken in."),
    "num_generation_tokens": ("vllm_generation_tokens", "Tokens generated."),
}


class Metrics:
    """All series of one replica. `record_stats` must be called from the replica's loop."""

    def __init__(self, model_name: str, session_len: int) -> None:
        self._tags = {"model_name": model_name, "engine": "0"}
        tokens = _one_two_five(session_len)
        self.ttft = self._histogram("vllm_time_to_first_token_seconds", TTFT_S)
        self._inter_token = self._histogram("vllm_inter_token_latency_seconds", TOKEN_S)
        self._inter_token_values: list[float] = []
        self.per_token = self._histogram("vllm_request_time_per_output_token_seconds", TOKEN_S)
        self.e2e = self._histogram("vllm_e2e_request_latency_seconds", REQUEST_S)
        self.framework = self._histogram("manta_request_framework_time_seconds", TTFT_S)
        self.queue = self._histogram("vllm_request_queue_time_seconds", PART_S)
        self.inference = self._histogram("vllm_request_inference_time_seconds", REQUEST_S)
        self.prefill = self._histogram("vllm_request_prefill_time_seconds", PART_S)
        self.decode = self._histogram("vllm_request_decode_time_seconds", PART_S)
        self.prompt_tokens = self._histogram("vllm_request_prompt_tokens", tokens)
        self.generation_tokens = self._histogram("vllm_request_generation_tokens", tokens)
        self._iteration_tokens = self._histogram("vllm_iteration_tokens_total", ITERATION_TOKENS)
        self._seconds = self._counter("manta_request_seconds", "Of requests, by part.", PART)
        self._seconds_values: defaultdict[Part, float] = defaultdict(float)
        self._success = self._counter("vllm_request_success", "Sequences that ended.", REASON)
        self._recoveries = self._counter(
            "manta_engine_recoveries", "Engines started for dead ones."
        )
        self._gauges = {field: self._gauge(*named) for field, named in _GAUGES.items()}
        self._counters = {field: self._counter(*named) for field, named in _COUNTERS.items()}
        self._latest = self._recorded = EngineStats()
        self._has_engine = False  # whose gauges are to be told; guests know only their requests
        self._loop = asyncio.get_running_loop()
        self._is_due = False
        self._timer = self._loop.call_later(0, self._record)

    def record_stats(self, stats: EngineStats) -> None:
        """Keep the engine's latest numbers; they are recorded within INTERVAL_S."""
        self._latest = stats
        self._has_engine = True
        if not self._is_due:
            self._is_due = True
            self._timer.cancel()
            self._timer = self._loop.call_later(INTERVAL_S, self._record)

    def record_recovery(self) -> None:
        """Another engine takes a dead one's place, and counts from zero."""
        self._record()
        self._latest = self._recorded = EngineStats()
        self._recoveries.inc()

    def record_inter_token(self, seconds: float) -> None:
        self._inter_token_values.append(seconds)

    def record_seconds(self, part: Part, seconds: float) -> None:
        self._seconds_values[part] += seconds

    def record_end(self, finished_reason: str) -> None:
        self._success.inc(1, {REASON: finished_reason})

    def _record(self) -> None:
        self._is_due = False
        self._timer.cancel()
        self._timer = self._loop.call_later(REFRESH_S, self._record)
        latest, before, self._recorded = self._latest, self._recorded, self._latest
        for field, gauge in self._gauges.items() if self._has_engine else ():
            gauge.set(getattr(latest, field))
        for field, counter in self._counters.items():
            if added := getattr(latest, field) - getattr(before, field):
                counter.inc(added)
        if steps := latest.num_steps - before.num_steps:
            added = latest.num_batched_tokens - before.num_batched_tokens
            self._iteration_tokens.observe(added / steps)  # the mean of the interval's steps
        values, self._inter_token_values = self._inter_token_values, []
        for value in values[:: -(-len(values) // MAX_SAMPLES) or 1]:
            self._inter_token.observe(value)

        for part, seconds in self._seconds_values.items():
            if seconds > 0:
                self._seconds.inc(seconds, {PART: part})
        self._seconds_values.clear()

    def _histogram(self, name: str, boundaries: list[float]) -> Histogram:
        description = name.removeprefix("vllm_").replace("_", " ")
        histogram = Histogram(name, description, boundaries, LABELS)
        histogram.set_default_tags(dict(self._tags))
        return histogram

    def _gauge(self, name: str, description: str) -> Gauge:
        gauge = Gauge(name, description, LABELS)
        gauge.set_default_tags(dict(self._tags))
        return gauge

    def _counter(self, name: str, description: str, *more: str) -> Counter:
        counter = Counter(name, description, (*LABELS, *more))
        counter.set_default_tags(dict(self._tags))
        return counter


class SequenceTimer:
    """The times of one sequence, recorded as its outputs reach the replica."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._start = self._last = time.perf_counter()
        self._first: float | None = None
        self._queue = self._prefill = 0.0

    def on_output(self, output: SequenceOutput) -> None:
        """Tokens arrived. The times of the first report count: an engine that takes a dead one's
        place measures its own."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now
            self._queue, self._prefill = output.queue_time, output.prefill_time
            self._metrics.ttft.observe(now - self._start)
        else:
            self._metrics.record_inter_token(now - self._last)
        self._last = now

    def on_end(self, num_tokens: int, finished_reason: str) -> None:
        """The sequence ended: stop, length or abort."""
        metrics = self._metrics
        metrics.record_end(finished_reason)
        if self._first is None:
            return
        decode = self._last - self._first
        metrics.e2e.observe(self._last - self._start)
        metrics.queue.observe(self._queue)
        metrics.prefill.observe(self._prefill)
        metrics.decode.observe(decode)
        metrics.inference.observe(self._prefill + decode)
        metrics.record_seconds("queue", self._queue)
        metrics.record_seconds("prefill", self._prefill)
        metrics.record_seconds("decode", decode)
        metrics.prompt_tokens.observe(self._num_prompt_tokens)
        metrics.generation_tokens.observe(num_tokens)
        if num_tokens > 1:
            metrics.per_token.observe(decode / (num_tokens - 1))


def _one_two_five(limit: int) -> list[float]:
    """1, 2, 5, 10, 20, … up to `limit`."""
    steps = (mantissa * 10**exponent for exponent in range(9) for mantissa in (1, 2, 5))
    return [float(step) for step in steps if step <= limit] or [1.0]
