"""A fleet in simulated time: arrivals, routing, Serve's control loop around the real policy.

What is real: Scheduler, BlockManager, admission, LoadMeter, QueueDepthPolicy and the delays that
Serve puts on its answer. What is a formula: the GPU (simulated_replica.Gpu) and how long a replica
takes to start. What is simple: requests go to the replica with the fewest open ones, as HAProxy's
leastconn does, unless a Router chooses; a scale-down takes the youngest replicas, which end what
they have.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

from benchmarks.simulated_replica import Gpu, Request, SimulatedReplica, prompt
from benchmarks.simulated_router import Router
from benchmarks.traffic import Arrival
from serve_app.autoscaling import QueueDepthPolicy, ReplicaLoad

CONTROL_S = 0.1  # Serve's control loop
SAMPLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a client was promised, for a request to count."""

    first_token_s: float = 2.0
    token_s: float = 0.05  # between tokens, the mean of a request

    def met(self, request: Request) -> bool:
        if not math.isfinite(request.end):
            return False
        between = (request.end - request.first_token) / request.arrival.output_tokens
        waited = request.first_token - request.arrival.time
        return waited <= self.first_token_s and between <= self.token_s


@dataclass(frozen=True)
class Outcome:
    requests: list[Request]
    replica_seconds: float
    seconds: float  # until the last request ended
    cached: float  # share of prompt tokens found in a prefix cache
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    # of which each is (time, replicas decided, replicas running, requests open)


class Fleet:
    """One run. `scaling` is a deployment's autoscaling_config; equal bounds are a fixed number."""

    def __init__(
        self,
        scaling: dict[str, Any],
        *,
        gpu: Gpu,
        quantum: int,
        start_s: float,
        router: Router | None = None,
    ) -> None:
        self._config = AutoscalingConfig(**scaling)
        self._policy = QueueDepthPolicy(**self._config.policy.policy_kwargs)
        self._gpu, self._quantum, self._start_s = gpu, quantum, start_s
        self._router = router
        self._replicas: list[SimulatedReplica] = []  # not draining, the oldest first
        self._stopped: list[SimulatedReplica] = []
        self._balance: list[tuple[int, int, SimulatedReplica]] = []  # may hold outdated counts
        self._held: deque[Request] = deque()
        self._loads: dict[int, ReplicaLoad] = {}  # as last reported, by id of the replica
        self._reported = -math.inf
        self._delay: dict[str, Any] = {}
        self._events: list[tuple[float, int, SimulatedReplica | None]] = []
        self._order = itertools.count()
        self._num_open = 0
        self._samples: list[tuple[float, int, int, int]] = []
        for _ in range(self._config.initial_replicas or self._config.min_replicas):
            self._start(-start_s)

    def run(self, arrivals: Sequence[Arrival]) -> Outcome:
        requests = [Request(arrival, prompt(arrival, self._quantum)) for arrival in arrivals]
        pending = deque(requests)
        self._push(0.0, None)
        now = 0.0
        while pending or self._num_open:
            at, _, replica = self._events[0]
            if pending and pending[0].arrival.time <= at:
                now = pending[0].arrival.time
                self._arrive(pending.popleft(), now)
                continue
            heapq.heappop(self._events)
            now = at
            if replica is None:
                self._control(now)
                self._push(now + CONTROL_S, None)
            elif replica.busy:
                self._num_open -= replica.end_step(now)
                self._continue(replica, now)
            else:
                self._ready(replica, now)
        everyone = [*self._replicas, *self._stopped]
        seconds = sum((now if r.stopped_at is None else r.stopped_at) - max(0.0, r.started_at)
                      for r in everyone)  # fmt: skip
        return Outcome(requests, seconds, now, _cached(everyone), self._samples)

    # -- requests -----------------------------------------------------------------------------

    def _arrive(self, request: Request, now: float) -> None:
        self._num_open += 1
        self._held.append(request)
        self._deliver(now)

    def _deliver(self, now: float) -> None:
        """Hand what is held to replicas, if any runs."""
        while self._held and (replica := self._chosen(self._held[0], now)) is not None:
            request = self._held.popleft()
            replica.add(request, now)
            self._num_open -= request.refused
            self._enter(replica)
            if not replica.busy and replica.open:
                self._push(replica.begin_step(now), replica)

    def _chosen(self, request: Request, now: float) -> SimulatedReplica | None:
        if self._router is None:
            return self._least_open()
        running = [replica for replica in self._replicas if replica.ready_at <= now]
        return self._router.choose(request, running) if running else None

    def _least_open(self) -> SimulatedReplica | None:
        while self._balance:
            count, _, replica = heapq.heappop(self._balance)
            if not replica.draining and count == len(replica.open):
                return replica
        return None

    def _enter(self, replica: SimulatedReplica) -> None:
        if self._router is None:
            heapq.heappush(self._balance, (len(replica.open), next(self._order), replica))

    def _continue(self, replica: SimulatedReplica, now: float) -> None:
        if replica.open:
            self._push(replica.begin_step(now), replica)
        if replica.draining:
            self._stop_when_empty(replica, now)
        else:
            self._enter(replica)

    # -- replicas -----------------------------------------------------------------------------

    def _control(self, now: float) -> None:
        """What Serve's controller does ten times a second."""
        running = [replica for replica in self._replicas if replica.ready_at <= now]
        if now - self._reported >= self._config.metrics_interval_s - 1e-9:
            self._reported = now
            self._loads = {id(replica): replica.load(now) for replica in running}
        if self._router is not None:
            self._router.tell(running, now)
        target = len(self._replicas)
        if running:
            wanted = self._decide(running, target, now)
        else:  # Serve starts the first one itself, at once
            wanted = max(target, 1 if self._held else 0)
        bounds = self._config.min_replicas, self._config.max_replicas
        wanted = max(bounds[0], min(bounds[1], wanted))
        for _ in range(wanted - target):
            self._start(now)
        for _ in range(target - wanted):
            self._drain(self._replicas.pop(), now)
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_S - 1e-9:
            self._samples.append((now, wanted, len(running), self._num_open))

    def _decide(self, running: list[SimulatedReplica], target: int, now: float) -> int:
        loads = {key: load for replica in running if (load := self._loads.get(key := id(replica)))}
        names = ReplicaLoad.__dataclass_fields__
        metrics = {
            name: {
                key: (SimpleNamespace(value=getattr(load, name)),) for key, load in loads.items()
            }
            for name in names
        }
        context: Any = SimpleNamespace(
            current_time=now,
            current_num_replicas=len(running),
            target_num_replicas=target,
            total_queued_requests=float(len(self._held)),
            raw_metrics=metrics,
            config=self._config,
        )
        number, _ = self._policy(context)
        number, self._delay = _apply_delay_logic(number, target, self._config, self._delay, now)
        return number

    def _start(self, now: float) -> None:
        replica = SimulatedReplica(
            f"replica {next(self._order)}", self._gpu, self._quantum, now + self._start_s, now
        )
        self._replicas.append(replica)
        self._push(max(0.0, replica.ready_at), replica)

    def _ready(self, replica: SimulatedReplica, now: float) -> None:
        if not replica.draining:
            self._enter(replica)
            self._deliver(now)

    def _drain(self, replica: SimulatedReplica, now: float) -> None:
        replica.draining = True
        self._stopped.append(replica)
        self._stop_when_empty(replica, now)

    def _stop_when_empty(self, replica: SimulatedReplica, now: float) -> None:
        if not replica.open:
            replica.stopped_at = now

    def _push(self, at: float, replica: SimulatedReplica | None) -> None:
        heapq.heappush(self._events, (at, next(self._order), replica))


def _cached(replicas: Sequence[SimulatedReplica]) -> float:
    stats = [replica.stats() for replica in replicas]
    looked_up = sum(each.prefix_cache_queries for each in stats)
    return sum(each.prefix_cache_hits for each in stats) / max(1, looked_up)
