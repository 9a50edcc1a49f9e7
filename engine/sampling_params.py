"""What a request asks of the sampler: validated values, no tensors.

Names and meanings are the field's (OpenAI API, vLLM's extensions). Text-level stops (`stop`)
are applied where text exists (engine/text.py); everything else acts on token ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequestError

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
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails every comparison
                raise InvalidRequestError(
                    f"{name} must be between {low:g} and {high:g}, got {value!r}", name
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


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, 128),
    ("temperature", 0.0, 100.0),
    ("top_p", 1e-9, 1.0),
    ("top_k", -1, 2**31 - 1),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-3, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("seed", -(2**63), 2**63 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise InvalidRequestError(f"stop must be a list of non-empty strings, got {stop!r}", "stop")


def _check_tokens(params: SamplingParams) -> None:
    for token_id, bias in params.logit_bias.items():
        if not -100.0 <= bias <= 100.0:
            raise InvalidRequestError(
                f"logit_bias[{token_id}] must be between -100 and 100, got {bias!r}", "logit_bias"
            )
    if params.allowed_token_ids is not None and len(params.allowed_token_ids) == 0:
        raise InvalidRequestError(
            "allowed_token_ids is empty: no token could be sampled", "allowed_token_ids"
        )
    if not all(len(word) > 0 for word in params.bad_words):
        raise InvalidRequestError("bad_words holds an empty entry", "bad_words")
