"""EventIds: the ids of a stream's events, and going on behind the last one a client has.

    7a3f9c2e11d04b52.12-9ab3c4d1        seed, then per choice: tokens so far, CRC-32 of their ids
    7a3f9c2e11d04b52.12-9ab3c4d1.40-0c11f7a2x    two choices; the second has ended

Every draw is a function of (seed, position), so any replica can compute what the client has again,
see by the sums that it is the same, and go on. Nothing is kept for that anywhere.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from zlib import crc32

from engine.errors import InvalidRequestError, MantaError
from engine.outputs import SequenceOutput

if TYPE_CHECKING:
    from serve_app.generation import Delta

HEADER = "Last-Event-ID"
START = "0"  # the header's value of a client that has nothing yet
_ID = re.compile(r"([0-9a-f]{1,16})((?:\.\d{1,9}-[0-9a-f]{8}x?)+)")


class ResumeError(MantaError):
    """What was computed again is not what the client has."""


@dataclass(slots=True)
class Position:
    """How far a choice is."""

    num_tokens: int = 0
    checksum: int = 0
    ended: bool = False

    def __str__(self) -> str:
        return f"{self.num_tokens}-{self.checksum:08x}{'x' if self.ended else ''}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        num_tokens, checksum = text.split("-")
        return cls(int(num_tokens), int(checksum[:8], 16), checksum.endswith("x"))


class EventIds:
    """Follows a stream: `split` what the engine reports, `advance` by what becomes an event.

    `had` are the positions of the event the client asks to go on behind, none for a new stream.
    """

    def __init__(self, seed: int, num_choices: int, had: Sequence[Position] = ()) -> None:
        self.seed = seed
        self.resumes = bool(had)
        self._had = had or [Position() for _ in range(num_choices)]
        self._now = [Position() for _ in range(num_choices)]
        self._parts = [f"{seed % 2**64:x}", *map(str, self._had)]

    @classmethod
    def parse(cls, header: str, *, num_choices: int, seed: int | None, new_seed: int) -> "EventIds":
        """`seed` is the request's own. InvalidRequestError for an id of another request."""
        if header == START:
            return cls(new_seed if seed is None else seed, num_choices)
        found = _ID.fullmatch(header)
        if found is None:
            raise _unfit(f"must be the id of an event or {START!r}, got {header[:60]!r}")
        unsigned = int(found[1], 16)
        had_seed = unsigned - 2**64 if unsigned >= 2**63 else unsigned
        if seed not in (None, had_seed):
            raise _unfit(f"belongs to a stream with seed {had_seed}, the request has {seed}")
        had = [Position.parse(part) for part in found[2].split(".")[1:]]
        if len(had) != num_choices:
            raise _unfit(
                f"belongs to a stream of {len(had)} choices, the request has {num_choices}"
            )
        return cls(had_seed, num_choices, had)

    @property
    def replays(self) -> bool:
        """The client still has more than was computed of some choice."""
        return any(
            now.num_tokens < had.num_tokens or now.ended < had.ended
            for now, had in zip(self._now, self._had, strict=True)
        )

    def split(self, index: int, output: SequenceOutput) -> list[SequenceOutput]:
        """An output cut where the client's part of the choice ends."""
        had = self._had[index]
        size = had.num_tokens - self._now[index].num_tokens
        if had.ended or not 0 < size < len(output.token_ids):
            return [output]
        scores = output.logprobs
        head = replace(
            output,
            token_ids=output.token_ids[:size],
            logprobs=None if scores is None else scores[:size],
            finish_reason=None,
            stop_token_id=None,
        )
        tail = replace(
            output,
            token_ids=output.token_ids[size:],
            logprobs=None if scores is None else scores[size:],
            prompt_logprobs=None,
            num_cached_tokens=0,
        )
        return [head, tail]

    def advance(self, delta: "Delta") -> bool:
        """Whether the client lacks this. ResumeError when what it has is something else."""
        now, had = self._now[delta.index], self._had[delta.index]
        known = now.num_tokens < had.num_tokens or had.ended
        for token_id in delta.token_ids:
            now.checksum = crc32(token_id.to_bytes(4, "little"), now.checksum)
        now.num_tokens += len(delta.token_ids)
        now.ended = delta.finish_reason is not None
        ahead = now.num_tokens - had.num_tokens
        if known and (now.ended or ahead > 0 or (ahead == 0 and not had.ended)) and now != had:
            raise _differs(delta.index)
        if not known:
            self._parts[delta.index + 1] = str(now)
        return not known

    def id(self) -> str:
        return ".".join(self._parts)


def _unfit(why: str) -> InvalidRequestError:
    return InvalidRequestError(f"the header {HEADER} {why}", HEADER)


def _differs(index: int) -> ResumeError:
    return ResumeError(
        f"choice {index} came out different from what the client has: the request, the model or a "
        f"setting changed, or dtype is not float32; send it anew with {HEADER}: {START}"
    )
