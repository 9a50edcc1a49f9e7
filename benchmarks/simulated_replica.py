"""A replica whose GPU is a formula: the real Scheduler and BlockManager, and the time a step takes.

To go through hundreds of replicas, `quantum` tokens are one unit: the Scheduler hands out units,
and one simulated step stands for `quantum` real ones, in which every running sequence gains a
unit. A first token is dated within it, by the prompt tokens that come before; everything else
is as coarse as that step (some 0.1 s with a quantum of 8). quantum=1 is the real loop.
"""

import itertools
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.traffic import Arrival
from engine.batcher import MAX_PREFIXES, queue_full
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.outputs import EngineStats, StepResult
from engine.sampling_params import SamplingParams
from engine.scheduled_batch import ScheduledBatch
from engine.scheduler import Scheduler
from engine.sequence import EngineRequest
from serve_app.autoscaling import ReplicaLoad
from serve_app.autoscaling_stats import LoadMeter

CONFIG = EngineConfig(model="simulated", session_len=8192)
BLOCK_TOKENS = 64
OWN_IDS = 10_000_019  # prefixes have the ids below; a prime, so that prompts start far apart
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Milliseconds of a step, from a roofline.

    The defaults are Llama-3-8B in int4 on an H200 (4.3 TB/s, 790 TFLOPS): 3.6 GB of linear weights
    or 15 GFLOP a token, whichever takes longer; 1.05 GB of head; 131 KB of keys and values a token.
    `efficiency` of that is reached, and the host adds to every step.
    """

    weights_ms: float = 0.837
    token_ms: float = 0.0177
    head_ms: float = 0.244
    kv_token_ms: float = 3.05e-5
    efficiency: float = 0.65
    host_ms: float = 0.5
    kv_tokens: int = 600_000

    def seconds(self, num_steps: int, num_tokens: int, num_kv_tokens: int) -> float:
        """For that many steps; tokens and the KV tokens they read are those of all together."""
        linear = max(num_steps * self.weights_ms, num_tokens * self.token_ms)
        floor = linear + num_steps * self.head_ms + num_kv_tokens * self.kv_token_ms
        return (floor / self.efficiency + num_steps * self.host_ms) / 1000


@dataclass(slots=True, eq=False)
class Request:
    """An arrival and what became of it; times in seconds of the simulation."""

    arrival: Arrival
    token_ids: list[int]  # one for every unit of the prompt
    first_token: float = float("inf")
    end: float = float("inf")
    refused: bool = False


@dataclass(eq=False)
class SimulatedReplica:
    """Loads until `ready_at`; `step` whenever the last one has ended."""

    name: str
    gpu: Gpu
    quantum: int
    ready_at: float
    started_at: float
    draining: bool = False
    stopped_at: float | None = None
    open: dict[str, Request] = field(default_factory=dict)
    _batch: ScheduledBatch | None = None

    def __post_init__(self) -> None:
        blocks = BlockManager(
            self.gpu.kv_tokens // BLOCK_TOKENS, max(1, BLOCK_TOKENS // self.quantum), True
        )
        assert CONFIG.session_len is not None
        # As many units in a simulated step as tokens in a real one: it stands for `quantum`.
        self._scheduler = Scheduler(
            blocks,
            max_num_seqs=CONFIG.max_num_seqs,
            max_num_batched_tokens=CONFIG.max_num_batched_tokens,
            session_len=CONFIG.session_len // self.quantum,
            seed=0,
        )
        self._meter = LoadMeter(CONFIG.max_num_seqs)
        self._num_requests = 0

    @property
    def busy(self) -> bool:
        return self._batch is not None

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    def add(self, request: Request, now: float) -> None:
        """Queue it, or refuse it as the batcher would."""
        scheduler = self._scheduler
        error = queue_full(
            len(scheduler.waiting),
            scheduler.num_waiting_tokens * self.quantum + request.arrival.prompt_tokens,
            CONFIG.max_waiting_requests,
            CONFIG.max_waiting_tokens,
        )
        if error is not None:
            request.refused = True
            return
        self._num_requests += 1
        name = str(self._num_requests)
        self.open[name] = request
        params = SamplingParams(
            max_tokens=num_units(request.arrival.output_tokens, self.quantum),
            ignore_eos=True,
            temperature=0.0,
        )
        scheduler.add(
            EngineRequest(
                request_id=name,
                prompt_token_ids=request.token_ids,
                params=params,
                arrival_time=now,
            )
        )

    def begin_step(self, now: float) -> float:
        """Schedule a step; returns when it ends. There must be work."""
        batch = self._batch = self._scheduler.schedule()
        assert batch.seqs, "a simulated replica needs work to step"
        num_decodes, budget = batch.num_decodes, self._scheduler.max_num_batched_tokens
        num_prompt = batch.num_tokens - num_decodes
        num_steps = self.quantum if num_decodes else -(-num_prompt * self.quantum // budget)
        context = [seq.num_computed_tokens * self.quantum for seq in batch.seqs]
        num_kv_tokens = num_steps * sum(context[:num_decodes]) + sum(context[num_decodes:])
        seconds = self.gpu.seconds(num_steps, batch.num_tokens * self.quantum, num_kv_tokens)
        done = 0
        sampled = set(batch.sampled)
        for row, (seq, num_new) in enumerate(zip(batch.seqs, batch.num_new_tokens, strict=True)):
            done += num_new if row >= num_decodes else 0
            if row in sampled and len(seq.token_ids) == seq.num_prompt_tokens:
                share = max(1 / num_steps, done / (budget if num_decodes else num_prompt))
                self.open[seq.request_id].first_token = now + seconds * share
        return now + seconds

    def end_step(self, now: float) -> int:
        """Take in what the step computed; how many requests it ended."""
        assert self._batch is not None
        batch, self._batch = self._batch, None
        result = StepResult(np.ones(len(batch.sampled), dtype=np.int32))
        ended = [o.request_id for o in self._scheduler.update(batch, result) if o.finish_reason]
        for name in ended:
            self.open.pop(name).end = now
        return len(ended)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def cached_prefixes(self) -> list[int]:
        return self._scheduler.cached_prefixes(MAX_PREFIXES)

    def load(self, now: float) -> ReplicaLoad:
        waits = (now - seq.request.arrival_time for seq in self._scheduler.waiting)
        stats = replace(self.stats(), oldest_waiting_s=next(waits, 0.0))
        load = self._meter.read(stats, len(self.open), now)
        tokens = load.waiting_tokens * self.quantum
        drained = load.drained_tokens_per_s * self.quantum
        return replace(load, waiting_tokens=tokens, drained_tokens_per_s=drained)


def num_units(tokens: int, quantum: int) -> int:
    return max(1, -(-tokens // quantum))


def prompt(arrival: Arrival, quantum: int) -> list[int]:
    """Ids that only requests of the same prefix share."""
    shared = arrival.prefix_tokens // quantum
    own = max(1, num_units(arrival.prompt_tokens, quantum) - shared)
    first = 0 if arrival.prefix_id is None else arrival.prefix_id * 10_000
    start = OWN_IDS + next(_numbers) * OWN_IDS % 2**30
    return [*range(first, first + shared), *range(start, start + own)]
