"""TextStream: the text of one sequence while its tokens arrive, up to its stop string.

Holds back as little as it can: bytes that are not a character yet, and the longest tail that
could begin a stop string. Everything that acts on token ids (eos, stop_token_ids, max_tokens)
is the engine's; the caller aborts a sequence that a stop string ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.detokenizer import make_detokenizer
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


@dataclass(slots=True)  # not frozen: that would cost 0.5 µs per token
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

    A stop string counts from the token after `min_tokens` on; before that it is ordinary text.
    Where several complete, the one that ends first in the text wins, whatever the token borders.
    """

    def __init__(
        self, tokenizer: "Tokenizer", params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._detokenizer = make_detokenizer(
            tokenizer, params.skip_special_tokens, prompt_token_ids
        )
        self._stop = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held = ""  # decoded, but perhaps the start of a stop string

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
            return TextDelta(self._detokenizer.add(shown, finished), len(token_ids))
        pieces: list[str] = []
        for index, token_id in enumerate(shown):
            self._num_tokens += 1
            self._held += self._detokenizer.add([token_id], False)
            if self._num_tokens > self._min_tokens and (stop := self._find_stop()):
                pieces.append(self._held)
                return TextDelta("".join(pieces), index + 1, stop)
            pieces.append(self._release())
        if finished:
            pieces.append(self._held + self._detokenizer.add([], True))
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
