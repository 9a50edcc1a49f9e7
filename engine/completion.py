"""Completions: from one prompt to its n sequences, and each sequence's outputs as text.

Shared by the offline LLM and the server, so that both cut, count and end completions alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.outputs import FinishReason, SequenceOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from engine.text import TextStream

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


@dataclass(slots=True)  # not frozen: that would cost 1 µs per token
class CompletionDelta:
    """What one output added to a completion.

    `stop_reason` is the stop string, or the entry of stop_token_ids, that ended it; None for the
    model's own end of text.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class CompletionStream:
    """One sequence on its way to text."""

    def __init__(self, tokenizer: "Tokenizer", request: EngineRequest) -> None:
        self._text = TextStream(tokenizer, request.params, request.prompt_token_ids)
        self._own_stops = frozenset(request.params.stop_token_ids)

    def push(self, output: SequenceOutput) -> CompletionDelta:
        """Tokens after the one that completed a stop string are dropped: the engine ran ahead.

        When `finish_reason` is set here and not in `output`, the caller aborts the sequence.
        """
        added = self._text.push(
            output.token_ids,
            finished=output.finish_reason is not None,
            stop_token_id=output.stop_token_id,
        )
        finish_reason = output.finish_reason
        stop_reason: str | int | None = None
        if added.stop is not None:
            finish_reason, stop_reason = "stop", added.stop
        elif output.stop_token_id in self._own_stops:
            stop_reason = output.stop_token_id
        return CompletionDelta(
            added.text,
            output.token_ids[: added.num_tokens],
            None if output.logprobs is None else output.logprobs[: added.num_tokens],
            finish_reason,
            stop_reason,
        )


def sequence_requests(
    request_ids: Sequence[str],
    prompt_token_ids: list[int],
    params: SamplingParams,
    eos_token_ids: tuple[int, ...],
    cache_salt: str | None = None,
) -> list[EngineRequest]:
    """`params.n` sequences of one prompt. With a seed, sequence i draws with seed + i."""
    assert len(request_ids) == params.n
    return [
        EngineRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            eos_token_ids=eos_token_ids,
            seed=None if params.seed is None else _wrap_int64(params.seed + index),
            cache_salt=cache_salt,
        )
        for index, request_id in enumerate(request_ids)
    ]


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
