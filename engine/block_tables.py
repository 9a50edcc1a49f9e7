"""Block tables of the running sequences: what changes in them, and a worker's copy on the host.

Every batch names the entries that changed since the one before, so that a worker must be given
all of them in order. What positions and slots the batch's tokens have follows from the tables.
"""

from dataclasses import dataclass

import numpy as np

from engine.batch import Batch, Int32Array, table_width
from engine.sequence import Sequence


class TableChanges:
    """What no step has told the workers yet."""

    def __init__(self, session_len: int, block_size: int) -> None:
        self._width = table_width(session_len, block_size)
        self._changes: dict[int, int] = {}  # by entry of all tables as one array, each once

    def note(self, seq: Sequence, start: int) -> None:
        """The block table of `seq` is new from index `start` on."""
        first = seq.row * self._width
        self._changes.update(enumerate(seq.block_table[start:], first + start))

    def take_changes(self) -> dict[int, int]:
        changes, self._changes = self._changes, {}
        return changes


@dataclass(frozen=True, slots=True)
class Places:
    """Where a batch of T tokens and S sequences reads and writes; B blocks in its longest table."""

    positions: Int32Array  # [T]
    slot_mapping: Int32Array  # [T] block_id * block_size + offset: where each token's KV goes
    block_tables: Int32Array  # [S, B]; entries past a sequence's own blocks are arbitrary ids


class BlockTables:
    def __init__(self, max_num_seqs: int, session_len: int, block_size: int) -> None:
        width = table_width(session_len, block_size)
        self._tables: Int32Array = np.zeros((max_num_seqs, width), dtype=np.int32)
        self._block_size = block_size

    def advance(self, batch: Batch) -> Places:
        """Take in the batch's changes; say where it is."""
        size = self._block_size
        if len(batch.table_entries) > 0:
            self._tables.reshape(-1)[batch.table_entries] = batch.table_block_ids
        ends = batch.context_lens
        longest = int(ends.max())
        if batch.num_decodes == batch.num_seqs:
            rows, positions = batch.rows, ends - 1
        else:
            num_new = np.diff(batch.query_start_loc)
            rows = np.repeat(batch.rows, num_new)
            shifts = np.repeat(ends - batch.query_start_loc[1:], num_new)
            positions = np.arange(batch.num_tokens, dtype=np.int32) + shifts
        slots = self._tables[rows, positions // size] * size + positions % size
        return Places(positions, slots, self._tables[batch.rows, : -(-longest // size)])
