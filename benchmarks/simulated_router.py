"""Cache-aware routing in simulated time: what replicas hear of each other, and whom they choose.

What is real: routing.choose, QueueMeter, the hashes and the BlockManager they come from. What is
simple: a client is connected to a replica by chance, and a replica knows of its own requests what
it has sent since the directory told it last.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

from benchmarks.simulated_replica import BLOCK_TOKENS, Request, SimulatedReplica
from engine.prefix import prefix_hashes
from serve_app.directory import INTERVAL_S
from serve_app.peers import QueueMeter
from serve_app.routing import Candidate, Prompt, choose, num_to_compute


@dataclass(slots=True)
class _Sent:
    """By one replica to another, since the directory told of that."""

    num_sequences: int = 0
    num_tokens: int = 0
    hashes: set[int] = field(default_factory=set)


class Router:
    def __init__(self, quantum: int, seed: int) -> None:
        self._quantum = quantum
        self._block_units = max(1, BLOCK_TOKENS // quantum)
        self._rng = random.Random(seed)
        self._meters: defaultdict[str, QueueMeter] = defaultdict(QueueMeter)
        self._told: dict[str, Candidate] = {}
        self._told_at = -math.inf
        self._sent: defaultdict[tuple[str, str], _Sent] = defaultdict(_Sent)

    def tell(self, replicas: Sequence[SimulatedReplica], now: float) -> None:
        """What the directory does every INTERVAL_S."""
        if now - self._told_at < INTERVAL_S - 1e-9:
            return
        self._told_at = now
        self._sent.clear()
        self._told = {replica.name: self._describe(replica) for replica in replicas}

    def choose(self, request: Request, replicas: Sequence[SimulatedReplica]) -> SimulatedReplica:
        """The engine that the replica the client is connected to sends the request to."""
        by_name = {replica.name: replica for replica in replicas}
        own = self._rng.choice(list(by_name))
        block_tokens = self._block_units * self._quantum
        hashes = prefix_hashes(request.token_ids, self._block_units, None)
        candidates = [self._candidate(own, name) for name in by_name]
        prompts = [Prompt(request.arrival.prompt_tokens, hashes)]
        found = choose(prompts, candidates, block_size=block_tokens, own=own)
        sent = self._sent[own, found.id]
        sent.num_sequences += 1
        sent.num_tokens += num_to_compute(prompts, found, block_tokens)
        sent.hashes.update(hashes)
        return by_name[found.id]

    def _describe(self, replica: SimulatedReplica) -> Candidate:
        stats = replica.stats()
        meter = self._meters[replica.name]
        meter.read(stats)
        waiting = meter.num_tokens * self._quantum
        prefixes = frozenset(replica.cached_prefixes())
        return Candidate(replica.name, stats.num_running + stats.num_waiting, waiting, prefixes)

    def _candidate(self, own: str, name: str) -> Candidate:
        told = self._told.get(name) or Candidate(name, 0, 0, frozenset())
        sent = self._sent.get((own, name))
        if sent is None:
            return told
        return Candidate(
            name,
            told.num_sequences + sent.num_sequences,
            told.num_waiting_tokens + sent.num_tokens,
            _Either(told.prefixes, sent.hashes),
        )


class _Either(Set[int]):
    """Two sets as one, without a copy of thousands of hashes for each request."""

    def __init__(self, first: Set[int], second: Set[int]) -> None:
        self._first, self._second = first, second

    def __contains__(self, item: object) -> bool:
        return item in self._first or item in self._second

    def __iter__(self) -> Iterator[int]:
        yield from self._first
        yield from self._second - self._first

    def __len__(self) -> int:
        return sum(1 for _ in self)
