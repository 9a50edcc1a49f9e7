"""Sequence: one prompt and its generated tokens, with the counters scheduling needs.

Owned by the Scheduler alone; other processes see EngineRequest (in) and SequenceOutput (out).
"""

import time
from dataclasses import dataclass, field
from enum import Enum

from engine.errors import InvalidRequestError
from engine.outputs import TokenLogprobs
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A sequence as it is submitted.

    `output_token_ids` is not empty when a stream is resumed: those tokens count as generated
    already (penalties, draw positions, max_tokens) and what comes with the first token as
    reported. `eos_token_ids` come from the text layer; the engine reads no tokenizer.
    `cache_salt` separates prefix caches. `waited_s` is how long it waited before it came to this
    engine, for one that died or had to start. `arrival_time` is on the monotonic clock of the
    process that steps the engine (RequestBatcher sets it): clocks of two nodes may differ.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    seed: int | None = None  # in place of params.seed: where n completions of a prompt differ
    output_token_ids: list[int] = field(default_factory=list)
    cache_salt: str | None = None
    waited_s: float = 0.0
    arrival_time: float = field(default_factory=time.monotonic)


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Scheduler state of one request.

    num_tokens counts prompt, known output and pending tokens; num_computed_tokens counts those
    whose keys and values are in the cache or being written by a launched step. Their difference
    is all the work there is: prefill, chunk, decode and recompute are the same subtraction.
    """

    request: EngineRequest
    token_ids: list[int]  # prompt + known output
    num_prompt_tokens: int
    seed: int
    max_output_tokens: int  # never below 1
    stop_token_ids: frozenset[int]  # eos (unless ignored) and the request's own
    status: Status = Status.WAITING
    block_table: list[int] = field(default_factory=list)
    row: int = -1  # index in the worker's request table while running
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0  # sampled on the device, value not yet known here (0 or 1)
    num_steps_in_flight: int = 0  # launched steps that compute some of its tokens
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, kept for good
    num_cached_blocks: int = 0  # leading blocks of the table that others can find
    first_scheduled_time: float | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of tokens 1, 2, …

    @classmethod
    def from_request(cls, request: EngineRequest, session_len: int, seed: int) -> "Sequence":
        """`seed` is used when neither the request nor its params have one.

        InvalidRequestError when a session of that length has no room for it.
        """
        params = request.params
        asked = params.seed if request.seed is None else request.seed
        num_prompt_tokens = len(request.prompt_token_ids)
        room = session_len - num_prompt_tokens
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        _check_room(request, session_len, limit)
        eos = () if params.ignore_eos else request.eos_token_ids
        return cls(
            request=request,
            token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            num_prompt_tokens=num_prompt_tokens,
            seed=seed if asked is None else asked,
            max_output_tokens=limit,
            stop_token_ids=frozenset(eos) | frozenset(params.stop_token_ids),
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


def _check_room(request: EngineRequest, session_len: int, max_output_tokens: int) -> None:
    num_prompt_tokens, num_generated = len(request.prompt_token_ids), len(request.output_token_ids)
    if num_prompt_tokens == 0:
        raise InvalidRequestError("the prompt is empty; it needs at least one token", "prompt")
    if num_prompt_tokens >= session_len:
        raise InvalidRequestError(
            f"the prompt has {num_prompt_tokens} tokens; this model takes at most "
            f"{session_len - 1} so that one more can be generated",
            "prompt",
        )
    if num_generated >= max_output_tokens:
        raise InvalidRequestError(
            f"{num_generated} tokens are generated already and max_tokens is {max_output_tokens}",
            "output_token_ids",
        )
    if request.params.min_tokens > max_output_tokens:
        raise InvalidRequestError(
            f"min_tokens is {request.params.min_tokens}; after this prompt at most "
            f"{max_output_tokens} tokens can be generated",
            "min_tokens",
        )
