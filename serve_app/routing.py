"""choose: which of a model's engines computes a request. Pure: knows no Ray, clock or network.

A request is weighed in prompt tokens. What it costs at an engine is

    the tokens of its prompts that lie in none of that engine's cached prefixes
    + the prompt tokens that wait there already
    + running_tokens × the sequences that are there

and the cheapest engine gets it. The replica's own engine keeps it unless another one saves more
than min_gain_tokens: what is told about others is up to a second old, and costs that are nearly
equal would send requests to and fro. A request of a session goes where the session lives,
whatever is cached, while that engine's load exceeds the least one by at most
session_slack_tokens; sessions are spread by rendezvous hashing, so that every replica finds the
same engine without being told, and an engine that comes or goes moves only its own share.
"""

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy:
    """The weights of the formula above."""

    running_tokens: int = 16  # a running sequence takes one token of every step
    min_gain_tokens: int = 64
    session_slack_tokens: int = 2048  # one step's default max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine as its replica last described it."""

    id: str
    num_sequences: int  # running and waiting
    num_waiting_tokens: int
    prefixes: Set[int]  # hashes of prompt beginnings in its cache, engine.prefix.prefix_hashes


@dataclass(frozen=True, slots=True)
class Prompt:
    """One that a request has in it; its first i + 1 blocks have the hash `hashes[i]`."""

    num_tokens: int
    hashes: Sequence[int]


DEFAULT = RoutingPolicy()


def choose(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    *,
    block_size: int,
    own: str | None = None,
    session_id: str | None = None,
    policy: RoutingPolicy = DEFAULT,
) -> Candidate:
    """The engine for a request of these prompts, which all go there.

    `own` is the id of the replica's own engine, None when it has none of this model.
    `candidates` must not be empty.
    """
    if session_id is not None:
        return _home(session_id, candidates, policy)
    costs = {
        each.id: load(each, policy) + num_to_compute(prompts, each, block_size)
        for each in candidates
    }
    # Between equals the same prompt goes to the same engine, whichever replica asks.
    hashes = prompts[0].hashes
    key = str(hashes[-1]) if hashes else ""
    cheapest = min(candidates, key=lambda each: (costs[each.id], _score(key, each.id)))
    for each in candidates:
        if each.id == own and costs[each.id] <= costs[cheapest.id] + policy.min_gain_tokens:
            return each
    return cheapest


def load(candidate: Candidate, policy: RoutingPolicy = DEFAULT) -> int:
    """What is to be computed there before and beside a new request, in tokens."""
    return candidate.num_waiting_tokens + policy.running_tokens * candidate.num_sequences


def num_to_compute(prompts: Sequence[Prompt], candidate: Candidate, block_size: int) -> int:
    """Prompt tokens that lie in none of the engine's cached prefixes."""
    return sum(
        prompt.num_tokens - num_matched(prompt.hashes, candidate.prefixes) * block_size
        for prompt in prompts
    )


def num_matched(hashes: Sequence[int], prefixes: Set[int]) -> int:
    """How many leading blocks are cached.

    A hash covers all blocks before its own, and a cache drops a prefix last: the longest hash
    that is known is enough, although only some of the hashes are told.
    """
    for index in range(len(hashes) - 1, -1, -1):
        if hashes[index] in prefixes:
            return index + 1
    return 0


def _home(session_id: str, candidates: Sequence[Candidate], policy: RoutingPolicy) -> Candidate:
    least = min(load(each, policy) for each in candidates)
    return max(
        (each for each in candidates if load(each, policy) <= least + policy.session_slack_tokens),
        key=lambda each: _score(session_id, each.id),
    )


def _score(key: str, candidate_id: str) -> bytes:
    return hashlib.blake2b(f"{key}|{candidate_id}".encode(), digest_size=8).digest()
