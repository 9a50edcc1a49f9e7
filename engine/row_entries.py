"""RowEntries: flat (row, token id, value) triples of all rows, the form of every sparse edit.

Rows are replaced one by one as sequences are admitted and selected for a whole batch at once.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


class RowEntries:
    """Values are vectors of one type; shorter ones are padded on the left."""

    def __init__(self, pad: float = 0) -> None:
        self._pad = pad
        self._of_row: dict[int, tuple[Int64Array, NDArray[Any]]] = {}
        self._flat: tuple[Int64Array, Int64Array, NDArray[Any]] | None = None

    def replace(self, row: int, token_ids: list[int], values: NDArray[Any]) -> None:
        """Make token_ids [n] with values [n, width] the only entries of `row`."""
        had_entries = self._of_row.pop(row, None) is not None
        if token_ids:
            self._of_row[row] = np.array(token_ids, dtype=np.int64), values
        if token_ids or had_entries:
            self._flat = None

    def select(
        self, index_of_row: Int64Array
    ) -> tuple[Int64Array, Int64Array, NDArray[Any]] | None:
        """Batch index [n], token id [n] and value [n, width] of rows whose index is not -1.

        None when there is no such entry.
        """
        if not self._of_row:
            return None
        if self._flat is None:
            self._flat = self._flatten()
        rows, token_ids, values = self._flat
        indices = index_of_row[rows]
        present = indices >= 0
        if not present.any():
            return None
        return indices[present], token_ids[present], values[present]

    def _flatten(self) -> tuple[Int64Array, Int64Array, NDArray[Any]]:
        entries = self._of_row.values()
        width = max(values.shape[1] for _, values in entries)
        values = [
            np.pad(v, ((0, 0), (width - v.shape[1], 0)), constant_values=self._pad)
            if v.shape[1] < width
            else v
            for _, v in entries
        ]
        rows = np.repeat(
            np.fromiter(self._of_row, dtype=np.int64), [len(token_ids) for token_ids, _ in entries]
        )
        return rows, np.concatenate([ids for ids, _ in entries]), np.concatenate(values)
