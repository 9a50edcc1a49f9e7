"""How many replicas there should be: a pure function of their load, and the policy Serve runs.

A replica takes in a sequence when one of its `slots` is free; sequences beyond that wait. Within
`drain_s` seconds a replica takes in its slots and what it drains meanwhile, so that the number of
replicas for what is open is one division: a jump, whatever there is now. What loads counts as if
it were there, and waits that began before it came say nothing of it.

Serve pickles this module by value into its controller: it imports nothing of ours.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


@dataclass(frozen=True, kw_only=True)
class ReplicaLoad:
    """What a replica reports, under these names (record_autoscaling_stats)."""

    running: float  # sequences in the engine's running set
    waiting: float  # sequences that are open and not in it
    waiting_tokens: float  # prompt tokens of those
    oldest_waiting_s: float  # seconds since the first of them came
    slots: float  # sequences that can run at once
    kv_cache_usage: float  # share of KV blocks that they hold
    drained_per_s: float = 0.0  # sequences it takes in when more wait; 0: not measured yet
    drained_tokens_per_s: float = 0.0  # their prompt tokens


@dataclass(frozen=True, kw_only=True)
class QueueDepthSettings:
    """`policy_kwargs` of QueueDepthPolicy. ValueError names what cannot work."""

    drain_s: float = 2.0  # a queue that drains within this time asks for no further replica
    utilization: float = 0.7  # share of the slots in use that a replica fewer may lead to
    running_per_replica: int | None = None  # aim below max_num_seqs, for faster tokens

    def __post_init__(self) -> None:
        if not _is_number(self.drain_s) or not 0 < self.drain_s < math.inf:
            raise ValueError(f"drain_s must be a number of seconds above 0, got {self.drain_s!r}")
        if not _is_number(self.utilization) or not 0 < self.utilization <= 1:
            raise ValueError(
                f"utilization must be a share above 0 and at most 1, got {self.utilization!r}"
            )
        number = self.running_per_replica
        if number is not None and (not isinstance(number, int) or number is True or number < 1):
            raise ValueError(
                f"running_per_replica must be an integer of at least 1 or null, got {number!r}"
            )


def desired_replicas(
    loads: Sequence[ReplicaLoad],
    settings: QueueDepthSettings,
    *,
    target: int,
    held: float = 0.0,
    settled_s: float = math.inf,
) -> int:
    """The number of replicas for this load.

    `loads` are those of the replicas that run, `target` counts those that still load as well,
    `held` requests wait outside of any. `settled_s` seconds ago the last of the target came;
    0 while one loads. Between the number that takes in all and the number that leaves room
    (`utilization`) it is the target: constant load changes nothing twice.
    """
    if not loads:
        return max(target, 1) if held else target
    num_open = held + sum(load.running + load.waiting for load in loads)
    room = _mean([_room(load, settings) for load in loads])
    most = math.ceil(num_open / (room * settings.utilization))
    least = _least(loads, settings, num_open, settled_s)
    return max(least, min(target, most))


def _least(
    loads: Sequence[ReplicaLoad], settings: QueueDepthSettings, num_open: float, settled_s: float
) -> int:
    """How many take in all that is open within drain_s."""
    capacity = _mean([_capacity(load, settings, settled_s) for load in loads])
    by_sequences = math.ceil(num_open / capacity)
    measured = [load.drained_tokens_per_s for load in loads if load.drained_tokens_per_s > 0]
    if not measured:
        return by_sequences
    tokens = sum(load.waiting_tokens for load in loads) / (_mean(measured) * settings.drain_s)
    num_waiting = sum(load.waiting for load in loads)  # one that waits needs no second replica
    return max(by_sequences, math.ceil(min(tokens, num_waiting)))


def _capacity(load: ReplicaLoad, settings: QueueDepthSettings, settled_s: float) -> float:
    """Sequences a replica can have taken in within drain_s.

    Where one has waited longer than that with all replicas there, what was measured does not
    hold, and where slots are free meanwhile, something else (KV blocks, long prompts) is short.
    """
    slots = _slots(load, settings)
    if settings.drain_s < load.oldest_waiting_s <= settled_s:
        return max(1.0, min(slots, load.running))
    return slots + load.drained_per_s * settings.drain_s


def _room(load: ReplicaLoad, settings: QueueDepthSettings) -> float:
    """Sequences like those that run for which there are slots and KV blocks."""
    slots = _slots(load, settings)
    if not load.running or not load.kv_cache_usage:
        return slots
    return max(1.0, min(slots, load.running / load.kv_cache_usage))


def _slots(load: ReplicaLoad, settings: QueueDepthSettings) -> float:
    return min(load.slots, settings.running_per_replica or math.inf)


class QueueDepthPolicy:
    """What `policy_function` names. Serve makes one per deployment and asks it ten times a second.

    Serve applies its bounds and its delays to the answer. A scale-down goes to the largest number
    that was needed within `downscale_delay_s`, so that it is not decided by a lull.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = QueueDepthSettings(**settings)
        self._needed: deque[tuple[float, int]] = deque()  # within downscale_delay_s
        self._settled_at: float | None = None

    def __call__(self, ctx: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        assert ctx.config is not None
        assert ctx.current_time is not None
        now, target = ctx.current_time, ctx.target_num_replicas
        if ctx.current_num_replicas < target:
            self._settled_at = None
        elif self._settled_at is None:
            self._settled_at = now
        needed = desired_replicas(
            latest_loads(ctx.raw_metrics or {}),
            self._settings,
            target=target,
            held=ctx.total_queued_requests or 0.0,
            settled_s=0.0 if self._settled_at is None else now - self._settled_at,
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
