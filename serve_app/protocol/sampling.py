"""SamplingFields: the fields both completion protocols share, and the SamplingParams they mean.

Each description finishes the sentence "<field> must be …": it is the documentation at /docs and
the end of the error message. Ranges are checked where they are owned, by SamplingParams.
"""

from typing import Annotated, Any

from pydantic import Field

from engine.sampling_params import SamplingParams
from serve_app.errors import invalid, unsupported
from serve_app.protocol.strict import MAX_BIASES, Biases, Name, Strict, Texts, TokenIds
from serve_app.served_model import ServedModel

MAX_STOP = 16  # strings; each costs time per token, on the loop all streams share
MAX_STOP_CHARACTERS = 256
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_CHARACTERS = 256


class StreamOptions(Strict):
    include_usage: Annotated[bool | None, Field(description="true or false")] = None
    continuous_usage_stats: Annotated[bool | None, Field(description="true or false")] = None
    include_obfuscation: Annotated[bool | None, Field(description="false")] = None


class SamplingFields(Strict):
    model: Annotated[Name, Field(description="the name of the served model (GET /v1/models)")]
    stream: Annotated[bool | None, Field(description="true or false")] = None
    stream_options: Annotated[
        StreamOptions | None,
        Field(description="an object with include_usage and continuous_usage_stats"),
    ] = None
    n: Annotated[int | None, Field(description="a number of choices per prompt, 1 to 128")] = None
    temperature: Annotated[
        float | None, Field(description="a number, 0 (always the most likely token) to 100")
    ] = None
    top_p: Annotated[float | None, Field(description="a number above 0, at most 1")] = None
    top_k: Annotated[
        int | None, Field(description="a number of tokens, or 0 or -1 for all of them")
    ] = None
    min_p: Annotated[float | None, Field(description="a number from 0 to 1")] = None
    presence_penalty: Annotated[float | None, Field(description="a number from -2 to 2")] = None
    frequency_penalty: Annotated[float | None, Field(description="a number from -2 to 2")] = None
    repetition_penalty: Annotated[
        float | None, Field(description="a positive number, 1 for none")
    ] = None
    logit_bias: Annotated[
        Biases | None,
        Field(description=f"an object of up to {MAX_BIASES} token ids and biases, -100 to 100"),
    ] = None
    seed: Annotated[int | None, Field(description="a 64-bit integer")] = None
    stop: Annotated[str | Texts | None, Field(description="a string or a list of them")] = None
    stop_token_ids: Annotated[TokenIds | None, Field(description="a list of token ids")] = None
    ignore_eos: Annotated[bool | None, Field(description="true or false")] = None
    min_tokens: Annotated[int | None, Field(description="a number of tokens")] = None
    bad_words: Annotated[Texts | None, Field(description="a list of strings")] = None
    allowed_token_ids: Annotated[TokenIds | None, Field(description="a list of token ids")] = None
    include_stop_str_in_output: Annotated[bool | None, Field(description="true or false")] = None
    skip_special_tokens: Annotated[bool | None, Field(description="true or false")] = None
    prompt_logprobs: Annotated[
        int | None, Field(description="a number of alternatives per prompt token, 0 to 20")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None, Field(description="a number of tokens; the last ones are kept")
    ] = None
    cache_salt: Annotated[
        Name | None,
        Field(description="up to 256 characters; prefixes are shared only under an equal one"),
    ] = None
    return_token_ids: Annotated[bool | None, Field(description="true or false")] = None
    user: Annotated[
        Name | None, Field(description="up to 256 characters; they appear in the access log")
    ] = None

    def sampling_params(
        self,
        model: ServedModel,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        default_max_tokens: int | None = None,
    ) -> SamplingParams:
        """The request's values over the checkpoint's defaults over SamplingParams' own."""
        given = {name: getattr(self, name) for name in _PASSED_ON}
        given |= {
            "stop": _stop_strings(self.stop),
            "bad_words": _bad_words(model, self.bad_words),
            "max_tokens": max_tokens,
            "logprobs": logprobs,
        }
        for name in ("stop_token_ids", "allowed_token_ids"):  # before anything looks at each
            _check_count(name, given[name], model.info.vocab_size)
        defaults = {"max_tokens": default_max_tokens, **model.tokenizer.sampling_defaults}
        if defaults["max_tokens"] is not None:  # a default yields to what was asked for
            defaults["max_tokens"] = max(defaults["max_tokens"], self.min_tokens or 0)
        values: dict[str, Any] = defaults
        values |= {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**values)

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream=true", "stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise unsupported("stream_options.include_obfuscation")
        if self.stream and self.prompt_logprobs is not None:
            raise invalid("prompt_logprobs are not available with stream=true", "prompt_logprobs")

    def truncate(self, token_ids: list[int]) -> list[int]:
        keep = self.truncate_prompt_tokens
        if keep is None:
            return token_ids
        if keep < 1:
            raise invalid(
                f"truncate_prompt_tokens must be at least 1, got {keep}", "truncate_prompt_tokens"
            )
        return token_ids[-keep:]

    @property
    def params_size(self) -> int:
        """What sampling_params costs, in characters to encode."""
        num_token_ids = len(self.allowed_token_ids or ()) + len(self.stop_token_ids or ())
        return num_token_ids // 10 + 2 * sum(map(len, self.bad_words or ()))

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


_PASSED_ON = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)


def _check_count(name: str, token_ids: list[int] | None, vocab_size: int) -> None:
    if token_ids is not None and len(token_ids) > vocab_size:
        raise invalid(
            f"{name} holds {len(token_ids)} token ids; this model has {vocab_size} tokens", name
        )


def _stop_strings(stop: str | list[str] | None) -> list[str] | None:
    stops = [stop] if isinstance(stop, str) else stop
    if stops is not None and len(stops) > MAX_STOP:
        raise invalid(f"stop may hold {MAX_STOP} strings, got {len(stops)}", "stop")
    if stops is not None and max(map(len, stops), default=0) > MAX_STOP_CHARACTERS:
        raise invalid(f"a stop string may have {MAX_STOP_CHARACTERS} characters", "stop")
    return stops


def _bad_words(model: ServedModel, words: list[str] | None) -> list[list[int]] | None:
    """Each word as it is spelt at the start of a text and after a space."""
    if words is None:
        return None
    if len(words) > MAX_BAD_WORDS:
        raise invalid(f"bad_words may hold {MAX_BAD_WORDS} words, got {len(words)}", "bad_words")
    if max(map(len, words), default=0) > MAX_BAD_WORD_CHARACTERS:
        raise invalid(
            f"each of bad_words may have {MAX_BAD_WORD_CHARACTERS} characters", "bad_words"
        )
    encode = model.tokenizer.encode
    spellings = {
        tuple(encode(prefix + word.lstrip(), add_special_tokens=False))
        for word in words
        for prefix in ("", " ")
    }
    return [list(spelling) for spelling in sorted(spellings)]
