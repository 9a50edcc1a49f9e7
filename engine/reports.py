"""What a sequence reports when a step has drawn its token, or could not.

Changes nothing of a sequence but its tokens; whose turn it is next is the scheduler's business.
"""

import time

from engine.errors import InvalidRequestError, LogitsError, MantaError
from engine.outputs import SequenceOutput, TokenLogprobs
from engine.sequence import Sequence


def append_token(seq: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> SequenceOutput:
    """Append what was drawn; the report has a finish_reason when that was the last token."""
    seq.token_ids.append(token_id)
    num_output = len(seq.token_ids) - seq.num_prompt_tokens
    output = SequenceOutput(seq.request.request_id, [token_id])
    if logprobs is not None:
        output.logprobs = [logprobs]
    if num_output == 1:
        _describe_first(seq, output)
    if num_output == len(seq.request.output_token_ids) + 1:
        _time_first(seq, output)
    if token_id in seq.stop_token_ids and num_output >= seq.params.min_tokens:
        output.finish_reason = "stop"
        output.stop_token_id = token_id
    elif num_output >= seq.max_output_tokens:
        output.finish_reason = "length"
    return output


def without_token(seq: Sequence) -> SequenceOutput:
    """No token could be drawn: the sequence ends, and the report says why."""
    error: MantaError = LogitsError("the model gave NaN or infinite logits for this request")
    if seq.params.forbids_tokens:
        error = InvalidRequestError(
            "allowed_token_ids, bad_words, logit_bias and min_tokens together forbid every token",
            "allowed_token_ids",
        )
    return SequenceOutput(seq.request_id, finish_reason="error", error=error)


def _describe_first(seq: Sequence, output: SequenceOutput) -> None:
    """What a sequence reports once, with its first token, however often it is resumed."""
    output.num_cached_tokens = seq.num_cached_tokens
    if seq.params.prompt_logprobs is not None:
        output.prompt_logprobs = [None, *seq.prompt_logprobs]


def _time_first(seq: Sequence, output: SequenceOutput) -> None:
    assert seq.first_scheduled_time is not None
    output.queue_time = seq.first_scheduled_time - seq.request.arrival_time
    output.prefill_time = time.monotonic() - seq.first_scheduled_time
