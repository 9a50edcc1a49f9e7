"""What leaves the engine: plain values, safe to send between processes."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of one token and of its most likely alternatives, best first."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely token
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class SequenceOutput:
    """Everything one sequence produced since it was last reported.

    `error` is set when the sequence was refused or failed; finish_reason is then "error".
    `prompt_logprobs` comes once, with the first token; entry 0 is None (nothing precedes it).
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the eos or stop_token_ids entry that ended it
    num_cached_tokens: int = 0
    # Seconds, with the first token that this engine computed: from arrival to first scheduling
    # (with what it waited elsewhere), and from there to this token.
    queue_time: float = 0.0
    prefill_time: float = 0.0
    error: Exception | None = None

    def merge(self, later: "SequenceOutput") -> None:
        """Append what the same sequence produced after this."""
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += later.logprobs
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_token_id = later.stop_token_id
        self.error = later.error


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One snapshot of the engine: gauges now, counters since it started."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    oldest_waiting_s: float = 0.0  # how long the first has waited that has no token yet
    num_arrived: int = 0  # sequences taken in
    num_admitted: int = 0  # of those, scheduled at least once
    kv_cache_usage: float = 0.0  # share of blocks referenced, 0 to 1
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_steps: int = 0
    num_batched_tokens: int = 0  # over all steps


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the workers computed in one step. S sampled sequences, in the batch's order.

    `prompt_logprobs` pairs the index of a batch row with its scored prompt tokens, in order.
    """

    token_ids: NDArray[np.int32]  # [S]
    logprobs: list[TokenLogprobs | None] | None = None  # [S]; None when nobody asked
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = field(default_factory=list)
    invalid: list[int] = field(default_factory=list)  # sampled sequences without a usable token
