"""How many replicas there should be: a pure function of their load, and the policy Serve runs.

Rates decide, measured where sequences wait: what arrives, and what a replica takes in while more
wait, whatever it is short of (slots, KV blocks, computing). Replicas that still load take in
nothing, but are counted; the queue that grows until they come asks for no more. Where no
replica was ever short of anything, open sequences are counted against slots.

Serve pickles this module by value into its controller: it imports nothing of ours.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


# Replicas that would use less than this share of their slots are too many, whatever was measured.
LEAST_SHARE = 1 / 8


@dataclass(frozen=True, kw_only=True)
class ReplicaLoad:
    """What a replica reports, under these names (record_autoscaling_stats)."""

    running: float  # sequences in the engine's running set
    waiting: float  # sequences that are open and not in it
    waiting_tokens: float  # prompt tokens of those
    slots: float  # sequences that can run at once
    arrived_per_s: float  # sequences
    drained_per_s: float = 0.0  # sequences it takes in while more wait; 0: not measured
    drained_tokens_per_s: float = 0.0  # their prompt tokens


@dataclass(frozen=True, kw_only=True)
class QueueDepthSettings:
    """`policy_kwargs` of QueueDepthPolicy. ValueError names what cannot work."""

    utilization: float = 0.7  # share of what replicas can take in that a replica fewer may lead to
    drain_s: float = 10.0  # how soon a queue is to be gone once all replicas are there

    def __post_init__(self) -> None:
        if not _is_number(self.utilization) or not 0 < self.utilization <= 1:
            raise ValueError(
                f"utilization must be a share above 0 and at most 1, got {self.utilization!r}"
            )
        if not _is_number(self.drain_s) or not 0 < self.drain_s < math.inf:
            raise ValueError(f"drain_s must be a number of seconds above 0, got {self.drain_s!r}")


def desired_replicas(
    loads: Sequence[ReplicaLoad],
    settings: QueueDepthSettings,
    *,
    target: int,
    held: float = 0.0,
    loading: bool = False,
) -> int:
    """The number of replicas for this load.

    `loads` are those of the replicas that run, `target` counts those that still load as well
    (`loading`), `held` requests wait outside of any. Between the number that is short of
    nothing and the one that leaves room (`utilization`) it is the target: constant load changes
    nothing twice.
    """
    if not loads:
        return max(target, 1) if held else target
    num_open = held + sum(load.running + load.waiting for load in loads)
    slots = _mean([load.slots for load in loads])
    bound = num_open / max(1.0, LEAST_SHARE * slots)
    # One that filled just now ends nothing for a while; the fastest shows what each of them can.
    fastest = max(loads, key=lambda load: load.drained_per_s)
    if not fastest.drained_per_s:
        least, most = num_open / slots, bound
    else:
        drained = fastest.drained_per_s
        arriving = sum(load.arrived_per_s for load in loads) / drained
        queue = 0.0 if loading else _queue(loads, held, fastest) / (drained * settings.drain_s)
        # Halfway between full and `utilization`: before there is a queue, and not back and forth.
        least = min(bound, arriving / ((1 + settings.utilization) / 2) + queue)
        most = min(bound, arriving / settings.utilization + queue)
    return max(math.ceil(least), min(target, math.ceil(most)))


def _queue(loads: Sequence[ReplicaLoad], held: float, fastest: ReplicaLoad) -> float:
    """Sequences that wait; where their prompts are longer than those drained, more of these."""
    waiting = held + sum(load.waiting for load in loads)
    if not fastest.drained_tokens_per_s:
        return waiting
    sequences_per_token = fastest.drained_per_s / fastest.drained_tokens_per_s
    return max(waiting, sum(load.waiting_tokens for load in loads) * sequences_per_token)


class QueueDepthPolicy:
    """What `policy_function` names. Serve makes one per deployment and asks it ten times a second.

    Serve applies its bounds and its delays to the answer. A scale-down goes to the largest number
    that was needed within `downscale_delay_s`, so that it is not decided by a lull.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = QueueDepthSettings(**settings)
        self._needed: deque[tuple[float, int]] = deque()  # within downscale_delay_s

    def __call__(self, ctx: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        assert ctx.config is not None
        assert ctx.current_time is not None
        now, target = ctx.current_time, ctx.target_num_replicas
        needed = desired_replicas(
            latest_loads(ctx.raw_metrics or {}),
            self._settings,
            target=target,
            held=ctx.total_queued_requests or 0.0,
            loading=ctx.current_num_replicas < target,
        )
        self._needed.append((now, needed))
        while self._needed[0][0] < now - ctx.config.downscale_delay_s:
            self._needed.popleft()
        if needed >= target:
            return needed, {}
        # Less than the target in any case: Serve's delay starts over whenever it is not.
        return min(target - 1, max(number for _, number in self._needed)), {}


def latest_loads(metrics: Mapping[str, Mapping[Any, Sequence[Any]]]) -> list[ReplicaLoad]:
    """The last point of every replica: Serve's mean over time would make steps of a jump."""
    names = [field.name for field in fields(ReplicaLoad)]
    series = [metrics.get(name, {}) for name in names]
    replicas = [replica for replica in series[0] if all(each.get(replica) for each in series)]
    return [
        ReplicaLoad(**{n: each[replica][-1].value for n, each in zip(names, series, strict=True)})
        for replica in replicas
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
