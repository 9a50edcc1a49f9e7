"""Log probabilities of tokens, in OpenAI's two shapes and vLLM's for prompts."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel

from engine.outputs import TokenLogprobs

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf; OpenAI sends this for a token that cannot occur


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


def chat_logprobs(tokenizer: "Tokenizer", entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    def describe(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=tokenizer.token_text(token_id),
            logprob=max(logprob, LOWEST),
            bytes=list(tokenizer.token_bytes(token_id)),
        )

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **describe(entry.token_id, entry.logprob).model_dump(),
                top_logprobs=list(map(describe, entry.top_token_ids, entry.top_logprobs)),
            )
            for entry in entries
        ]
    )


def prompt_logprobs(
    tokenizer: "Tokenizer", entries: Sequence[TokenLogprobs | None]
) -> PromptLogprobs:
    """Per prompt token the likeliest tokens and the token itself; None for the first."""
    return [None if entry is None else _by_token_id(tokenizer, entry) for entry in entries]


def _by_token_id(tokenizer: "Tokenizer", entry: TokenLogprobs) -> dict[int, PromptLogprob]:
    ranked = [
        (token_id, logprob, rank)
        for rank, (token_id, logprob) in enumerate(
            zip(entry.top_token_ids, entry.top_logprobs, strict=True), start=1
        )
    ]
    return {
        token_id: PromptLogprob(
            logprob=max(logprob, LOWEST), rank=rank, decoded_token=tokenizer.token_text(token_id)
        )
        for token_id, logprob, rank in [*ranked, (entry.token_id, entry.logprob, entry.rank)]
    }


class CompletionLogprobsBuilder:
    """Makes the parallel lists of /v1/completions for one choice, chunk after chunk.

    `text_offset` counts characters of the choice's text (with echo: the prompt's first).
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def build(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
    ) -> CompletionLogprobs:
        return CompletionLogprobs(
            text_offset=[self._advance(token_id) for token_id in token_ids],
            token_logprobs=[None if e is None else max(e.logprob, LOWEST) for e in entries],
            tokens=[self._name(token_id) for token_id in token_ids],
            top_logprobs=[None if e is None else self._top(e) for e in entries],
        )

    def _advance(self, token_id: int) -> int:
        """Where the token's text starts; for a part of a character, where the character does."""
        if token_id in self._hidden:
            return self._offset
        pending = self._decoder.getstate()[0]
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        offset = self._offset
        self._offset += len(text)
        if pending and text.startswith("\ufffd"):
            return offset + 1  # what was pending is no character, and this token not its end
        return offset

    def _name(self, token_id: int) -> str:
        """The token's text; OpenAI's spelling for bytes that are only part of a character."""
        token_bytes = self._tokenizer.token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the one that was chosen."""
        pairs = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        top = {self._name(token_id): max(logprob, LOWEST) for token_id, logprob in pairs}
        top.setdefault(self._name(entry.token_id), max(entry.logprob, LOWEST))
        return top
