"""GpuEdits: what requests do to the logits, kept on the host per row and packed for a batch.

The edits themselves, and the conditions that depend on tokens the host does not know yet, are the
kernels' business (kernels/gpu/logit_edits.py); so are penalties, whose strengths the request table
holds. Here is what varies in length: biases, allowed tokens, bans and bad words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.batch import NewRow

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _RowEdits:
    set_entries: Int32Array  # [2, E] token id, bits of the bias
    bans: Int32Array  # [2, B] token id, 1 if before min_tokens only
    words: list[list[int]]  # bad words of two tokens or more


@dataclass(frozen=True, slots=True)
class PackedEdits:
    """Arrays of kernels.gpu.logit_edits.LogitEdits; an empty one stands for None there."""

    set_entries: Int32Array  # [3, E]
    ban_entries: Int32Array  # [3, E]
    words: Int32Array  # [4, W]
    word_tokens: Int32Array  # [T]

    def __bool__(self) -> bool:
        return any(array.size > 0 for array in (self.set_entries, self.ban_entries, self.words))


class GpuEdits:
    def __init__(self) -> None:
        self._of_row: dict[int, _RowEdits] = {}

    def admit(self, new: NewRow) -> None:
        """Take over a row for a sequence that entered the running set."""
        params = new.params
        edits = _RowEdits(
            set_entries=_set_entries(params.logit_bias, params.allowed_token_ids),
            bans=_bans(
                [word[0] for word in params.bad_words if len(word) == 1],
                [*new.eos_token_ids, *params.stop_token_ids] if params.min_tokens > 0 else [],
            ),
            words=[list(word) for word in params.bad_words if len(word) > 1],
        )
        self._of_row.pop(new.row, None)
        if edits.set_entries.size or edits.bans.size or edits.words:
            self._of_row[new.row] = edits

    def pack(self, rows: list[int], may_end: NDArray[np.bool_]) -> PackedEdits:
        """Edits of a batch of these rows; those that may end need no bans that keep them going."""
        sets, bans, words = [_NO_ENTRIES], [_NO_ENTRIES], []
        for index, row in enumerate(rows):
            edits = self._of_row.get(row)
            if edits is None:
                continue
            sets.append(_indexed(index, edits.set_entries))
            kept = edits.bans[1] <= (not may_end[index])
            bans.append(_indexed(index, edits.bans[:, kept]))
            words += [(index, word) for word in edits.words]
        lengths = [len(word) - 1 for _, word in words]
        starts = np.cumsum([0, *lengths])[:-1]
        return PackedEdits(
            set_entries=np.concatenate(sets, axis=1),
            ban_entries=np.concatenate(bans, axis=1),
            words=np.array(
                [[index for index, _ in words], [word[-1] for _, word in words], starts, lengths],
                dtype=np.int32,
            ),
            word_tokens=np.array([t for _, word in words for t in word[:-1]], dtype=np.int32),
        )


_NO_ENTRIES = np.zeros((3, 0), dtype=np.int32)


def _set_entries(bias: Mapping[int, float], allowed: Sequence[int] | None) -> Int32Array:
    """One entry per token that is set: no two programs may write the same logit."""
    token_ids = np.unique(np.array(list(bias) if allowed is None else allowed, dtype=np.int32))
    values = np.array([bias.get(t, 0.0) for t in token_ids.tolist()], dtype=np.float32)
    return np.stack([token_ids, values.view(np.int32)])


def _bans(always: list[int], early: list[int]) -> Int32Array:
    token_ids = np.array([*always, *early], dtype=np.int32)
    return np.stack([token_ids, (np.arange(len(token_ids)) >= len(always)).astype(np.int32)])


def _indexed(index: int, entries: Int32Array) -> Int32Array:
    return np.concatenate([np.full((1, entries.shape[1]), index, dtype=np.int32), entries])
