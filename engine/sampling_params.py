"""What a request asks of the sampler: validated values, no tensors.

Names and meanings are the field's (OpenAI API, vLLM's extensions). Text-level stops (`stop`)
are applied where text exists (engine/text.py); everything else acts on token ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequestError

MAX_BAD_WORD_TOKENS = 64  # all words of a request are padded to the longest
MAX_LOGPROBS = 20  # OpenAI's bound on top_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one sequence.

    temperature 0 is greedy. top_k 0 or -1 means all tokens. `seed` fixes every draw: token i of
    a sequence depends on (seed, i) and its own logits only. `logprobs` is the number of
    alternatives reported per generated token (0: the chosen token only), `prompt_logprobs` the
    same for prompt tokens. `bad_words` are token-id sequences that may not be completed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    bad_words: Sequence[Sequence[int]] = ()
    allowed_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, kind, low, high in _RANGES:
            _check_number(name, getattr(self, name), kind, low, high)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(
                    f"{name} must be true or false, got {getattr(self, name)!r}", name
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})",
                "min_tokens",
            )
        _check_stop(self.stop)
        _check_tokens(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def forbids_tokens(self) -> bool:
        """Whether the request itself may leave no token to draw."""
        return bool(self.allowed_token_ids or self.bad_words or self.logit_bias or self.min_tokens)

    def validate_vocab(self, vocab_size: int) -> None:
        """Raise InvalidRequestError when a token id lies outside [0, vocab_size)."""
        named: dict[str, Any] = {
            "logit_bias": self.logit_bias,
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [token_id for word in self.bad_words for token_id in word],
        }
        for name, token_ids in named.items():
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequestError(
                        f"{name} holds token id {token_id}; the vocabulary has ids 0 to "
                        f"{vocab_size - 1}",
                        name,
                    )


_RANGES: tuple[tuple[str, type, float, float], ...] = (
    ("n", int, 1, 128),
    ("temperature", float, 0.0, 100.0),
    ("top_p", float, 1e-9, 1.0),
    ("top_k", int, -1, 2**31 - 1),
    ("min_p", float, 0.0, 1.0),
    ("repetition_penalty", float, 1e-3, 100.0),
    ("presence_penalty", float, -2.0, 2.0),
    ("frequency_penalty", float, -2.0, 2.0),
    ("seed", int, -(2**63), 2**63 - 1),
    ("min_tokens", int, 0, 2**31 - 1),
    ("max_tokens", int, 1, 2**31 - 1),
    ("logprobs", int, 0, MAX_LOGPROBS),
    ("prompt_logprobs", int, 0, MAX_LOGPROBS),
)
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")


def _check_number(
    name: str, value: Any, kind: type, low: float, high: float, label: str | None = None
) -> None:
    if value is None and name in _OPTIONAL:
        return
    # bool is an int to Python, but `top_k: true` is a mistake; NaN fails every comparison
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        noun = "an integer" if kind is int else "a number"
        raise InvalidRequestError(
            f"{label or name} must be {noun} between {low} and {high}, got {_shown(value)}", name
        )


def _shown(value: Any) -> str:
    """An integer of a request may have thousands of digits, which Python refuses to print."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def _check_stop(stop: Sequence[str]) -> None:
    if not _is_list(stop) or not all(isinstance(s, str) and s for s in stop):
        raise InvalidRequestError(f"stop must be a list of non-empty strings, got {stop!r}", "stop")


def _check_tokens(params: SamplingParams) -> None:
    if not isinstance(params.logit_bias, Mapping):
        raise InvalidRequestError(
            f"logit_bias must map token ids to numbers, got {params.logit_bias!r}", "logit_bias"
        )
    _check_token_ids("logit_bias", list(params.logit_bias))
    for token_id, bias in params.logit_bias.items():
        _check_number("logit_bias", bias, float, -100.0, 100.0, f"logit_bias[{token_id}]")
    _check_token_ids("stop_token_ids", params.stop_token_ids)
    if params.allowed_token_ids is not None:
        _check_token_ids("allowed_token_ids", params.allowed_token_ids)
        if len(params.allowed_token_ids) == 0:
            raise InvalidRequestError(
                "allowed_token_ids is empty: no token could be sampled", "allowed_token_ids"
            )
    if not _is_list(params.bad_words):
        raise InvalidRequestError(
            f"bad_words must be a list of token id lists, got {params.bad_words!r}", "bad_words"
        )
    for word in params.bad_words:
        _check_token_ids("bad_words", word)
        if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError(
                f"each of bad_words must have 1 to {MAX_BAD_WORD_TOKENS} tokens, got {len(word)}",
                "bad_words",
            )


def _check_token_ids(name: str, token_ids: Sequence[int]) -> None:
    if not _is_list(token_ids) or not all(type(token_id) is int for token_id in token_ids):
        raise InvalidRequestError(f"{name} must hold integer token ids, got {token_ids!r}", name)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
