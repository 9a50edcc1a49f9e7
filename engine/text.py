"""TextStream: the text of one sequence while its tokens arrive, up to its stop string.

Holds back as little as it can: bytes that are not a character yet, and the longest tail that
could begin a stop string. Everything that acts on token ids (eos, stop_token_ids, max_tokens)
is the engine's; the caller aborts a sequence that a stop string ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


CONTEXT = 4  # tokens decoded again with new ones: SentencePiece drops a first token's space
MAX_WINDOW = 16  # tokens; 16 decode in 3 µs, and trimming costs a second decode
MAX_PENDING_WINDOW = 64  # tokens without a clean end (not UTF-8, or all special) before giving up
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens added.

    `num_tokens` says how many of them belong to the sequence: tokens after the one that completed
    a stop string do not (the engine ran ahead), and count in neither text nor usage.
    """

    text: str
    num_tokens: int
    stop: str | None = None  # the stop string that ended the sequence


class TextStream:
    """The pieces `push` returns join to the decoded tokens, cut at the stop string.

    (Exactly, but for tokens of SentencePiece's byte fallback that are not UTF-8: one decode turns
    characters before them, which are out already, into U+FFFD as well.)

    A stop string counts from the token after `min_tokens` on; before that it is ordinary text.
    Where several complete, the one that ends first in the text wins, whatever the token borders.
    """

    def __init__(
        self, tokenizer: "Tokenizer", params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._stop = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held = ""  # decoded, but perhaps the start of a stop string
        self._window = list(self._context(prompt_token_ids) or prompt_token_ids[-CONTEXT:])
        # Characters of the window's text that are out.
        self._emitted = len(self._decode_ids(self._window).rstrip(REPLACEMENT))

    def push(
        self, token_ids: Sequence[int], *, finished: bool = False, stop_token_id: int | None = None
    ) -> TextDelta:
        """Take new tokens. `finished`: they are the last; what is held back comes out.

        `stop_token_id`, when the last token is one that ended the sequence: it is shown only with
        include_stop_str_in_output.
        """
        shown = token_ids
        if stop_token_id is not None and not self._include_stop:
            assert token_ids[-1] == stop_token_id
            shown = token_ids[:-1]
        if not self._stop:
            return TextDelta(self._decode(shown, finished), len(token_ids))
        pieces: list[str] = []
        for index, token_id in enumerate(shown):
            self._num_tokens += 1
            self._held += self._decode([token_id], False)
            if self._num_tokens > self._min_tokens and (stop := self._find_stop()):
                pieces.append(self._held)
                return TextDelta("".join(pieces), index + 1, stop)
            pieces.append(self._release())
        if finished:
            pieces.append(self._held + self._decode([], True))
        return TextDelta("".join(pieces), len(token_ids))

    def _find_stop(self) -> str | None:
        """The stop string that ends first in the held text, which is then cut there."""
        found = [(self._held.find(stop), stop) for stop in self._stop]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if not ends:
            return None
        end, start, stop = min(ends)
        self._held = self._held[: end if self._include_stop else start]
        return stop

    def _release(self) -> str:
        """Held text without the longest tail that a stop string starts with."""
        held = self._held
        keep = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(held)), keep, -1):
                if held.endswith(stop[:length]):
                    keep = length
                    break
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut]

    def _decode(self, token_ids: Sequence[int], finished: bool) -> str:
        """Text that became certain with these tokens."""
        self._window += token_ids
        text = self._decode_ids(self._window)
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
            self._emitted = len(self._decode_ids(context))

    def _context(self, token_ids: Sequence[int]) -> Sequence[int] | None:
        """The last few tokens, from the start to the end of a character; None if they are not.

        SentencePiece spells a rare character as up to 4 byte tokens, and decodes a run of them
        that starts inside a character to nothing but U+FFFD: hence the tries.
        """
        for length in range(CONTEXT, CONTEXT + 4):
            text = self._decode_ids(token_ids[-length:])
            if text and text[0] != REPLACEMENT and text[-1] != REPLACEMENT:
                return token_ids[-length:]
        return None

    def _decode_ids(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
