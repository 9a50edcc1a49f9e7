"""Detokenizer: token ids to text while they arrive, never showing part of a character.

Two ways to the same text. Where tokens are bytes (Llama 3, Qwen, GPT-2) they are joined and decoded
as UTF-8: 0.4 µs per token. Otherwise (SentencePiece) the tokenizer decodes a window of the last
tokens again each time: 3 µs.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

CONTEXT = 4  # tokens of the prompt, or of what is out, that new ones are decoded with
MAX_WINDOW = 16  # tokens; 16 decode in 3 µs, and trimming costs a second decode
MAX_PENDING_WINDOW = 64  # tokens without a clean end (not UTF-8, or all special) before giving up
REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    def add(self, token_ids: Sequence[int], finished: bool) -> str:
        """Text that became certain with these tokens; all of it when they are the last."""
        ...


def make_detokenizer(
    tokenizer: "Tokenizer", skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()
) -> Detokenizer:
    """One per sequence. The text continues the prompt's, so that its spaces are right."""
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, skip_special_tokens, prompt_token_ids)
    return WindowDetokenizer(tokenizer, skip_special_tokens, prompt_token_ids)


class ByteDetokenizer:
    """For tokenizers whose text is the concatenation of their tokens' bytes."""

    def __init__(
        self, tokenizer: "Tokenizer", skip_special_tokens: bool, prompt_token_ids: Sequence[int]
    ) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decode = getincrementaldecoder("utf-8")("replace").decode
        self.add(prompt_token_ids[-CONTEXT:], False)  # it may end inside a character

    def add(self, token_ids: Sequence[int], finished: bool) -> str:
        pieces = [self._bytes_of(i) for i in token_ids if i not in self._hidden]
        return self._decode(b"".join(pieces), finished)


class WindowDetokenizer:
    """For any tokenizer.

    Exact, but for tokens of SentencePiece's byte fallback that are not UTF-8: one decode of the
    whole turns characters before them, which are out already, into U+FFFD as well.
    """

    def __init__(
        self, tokenizer: "Tokenizer", skip_special_tokens: bool, prompt_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(self._context(prompt_token_ids) or prompt_token_ids[-CONTEXT:])
        # Characters of the window's text that are out.
        self._emitted = len(self._decode(self._window).rstrip(REPLACEMENT))

    def add(self, token_ids: Sequence[int], finished: bool) -> str:
        self._window += token_ids
        text = self._decode(self._window)
        pending = len(self._window) > MAX_PENDING_WINDOW
        if not finished and not pending:
            text = text.rstrip(REPLACEMENT)  # the rest of the character may be on its way
        added = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        if len(self._window) > MAX_WINDOW:
            self._trim(force=pending)
        return added

    def _trim(self, force: bool) -> None:
        """Forget tokens whose text is out, keeping enough that new ones decode in context."""
        context = self._context(self._window)
        if context is None and force:
            context = self._window[-CONTEXT:]
        if context is not None:
            self._window = list(context)
            self._emitted = len(self._decode(context))

    def _context(self, token_ids: Sequence[int]) -> Sequence[int] | None:
        """The last few tokens, from the start to the end of a character; None if they are not.

        SentencePiece spells a rare character as up to 4 byte tokens, and decodes a run of them
        that starts inside a character to nothing but U+FFFD: hence the tries.
        """
        for length in range(CONTEXT, CONTEXT + 4):
            text = self._decode(token_ids[-length:])
            if text and text[0] != REPLACEMENT and text[-1] != REPLACEMENT:
                return token_ids[-length:]
        return None

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
