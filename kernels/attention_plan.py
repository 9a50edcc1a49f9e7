"""Which cache rows a step's attention reads, as index and mask tensors, from host arrays.

Knows block tables, lengths and windows; no keys, no queries. Built once per step and shared by
all layers that have the same window.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.kv_layout import LayerCache, QuantizedKV

Int32Array = NDArray[np.int32]
IntArray = NDArray[np.int64]

# Decode rows are attended in groups that gather at most so many bytes of K and V: what a step
# needs beside its weights stays bounded. 24 layers, 32 rows of 144 tokens, 8 heads of 64, two
# threads: 26 ms with groups of 5 or 10 MiB, 33 with 1.25, whose calls cost more than caches save.
GATHER_BYTES = 2**23
# Queries of a prefill chunk attended at once. Keys after a tile's last query are not read: 2048
# queries take 43 ms in tiles of 256 and 69 ms at once.
QUERY_TILE = 256


@dataclass(frozen=True, slots=True)
class KeyBlocks:
    """The keys R sequences need, from a block boundary on, and which of them each query sees."""

    rows: Tensor  # int64 [2 * R * Hkv * blocks] of a cache viewed as [-1, block_size * D]
    num_seqs: int
    num_kv_heads: int
    num_keys: int
    mask: Tensor  # 0 or -inf; [R, 1, 1, num_keys] or [queries, num_keys]
    foreign: tuple[Tensor, Tensor] | None = None  # int64 [n] each: sequence and key, not its own

    def gather(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """cache [num_blocks, 2 * Hkv, block_size, D] -> keys, values [R, Hkv, num_keys, D].

        Those of a quantised cache come in the mask's dtype. What is not a sequence's own is 0:
        another may have left a NaN there, which the mask would not stop (0 * NaN is NaN).
        """
        keys, values = self._gather(cache)
        if self.foreign is not None:
            for part in (keys, values):
                part.transpose(1, 2).index_put_(self.foreign, part.new_zeros(()))
        return keys, values

    def _gather(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        if isinstance(cache, QuantizedKV):
            first_heads = self.rows.view(self.num_seqs, 2 * self.num_kv_heads, -1)[:, 0]
            blocks = first_heads // (2 * self.num_kv_heads)
            keys, values = cache.gather(blocks, self.mask.dtype)
            return keys[:, :, : self.num_keys], values[:, :, : self.num_keys]
        blocks = cache.view(-1, cache.shape[2] * cache.shape[3]).index_select(0, self.rows)
        shape = (self.num_seqs, self.num_kv_heads, 2, -1, cache.shape[3])
        keys, values = blocks.view(shape)[:, :, :, : self.num_keys].unbind(2)
        return keys, values


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    first: int  # queries first:last of the decode rows, in the order of `DecodePlan`
    last: int
    keys: KeyBlocks


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Decode rows sorted by length, so that those of like length share a group."""

    order: Tensor | None  # int64 [decode rows]; None: as they come
    groups: list[DecodeGroup]


@dataclass(frozen=True, slots=True)
class PrefillTile:
    first: int  # queries first:last of the step's tokens
    last: int
    keys: KeyBlocks


@dataclass(frozen=True, slots=True)
class Planner:
    """Builds the indices for one cache shape, [num_blocks, 2 * Hkv, block_size, D], and window."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    window: int | None

    def decodes(self, context_lens: Int32Array, block_tables: Int32Array) -> DecodePlan:
        """One query per sequence, at context_lens - 1."""
        stops = context_lens.astype(np.int64)
        starts = self._first_keys(stops - 1)
        order = np.argsort(starts - stops, kind="stable")  # longest first
        in_order = bool((order[1:] > order[:-1]).all())
        sorted_rows = stops[order], starts[order], block_tables[order]
        return DecodePlan(
            order=None if in_order else torch.from_numpy(order).to(self.device),
            groups=list(self._decode_groups(*sorted_rows)),
        )

    def _decode_groups(
        self, stops: IntArray, starts: IntArray, block_tables: Int32Array
    ) -> Iterator[DecodeGroup]:
        key_bytes = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        first = 0
        while first < len(stops):
            num_keys = int(stops[first] - starts[first])
            last = min(first + max(1, GATHER_BYTES // (key_bytes * num_keys)), len(stops))
            rows = slice(first, last)
            keys = self._decode_keys(stops[rows], starts[rows], block_tables[rows], num_keys)
            yield DecodeGroup(first, last, keys)
            first = last

    def _decode_keys(
        self, stops: IntArray, starts: IntArray, block_tables: Int32Array, num_keys: int
    ) -> KeyBlocks:
        """Behind its end a sequence has its first block again, since other blocks are others'."""
        size, ends = self.block_size, stops[:, None]
        hidden = self._hidden(ends - 1 - starts[:, None] - np.arange(num_keys))
        columns = self._columns(starts, num_keys)
        columns = np.where(columns * size < ends, columns, columns[:, :1])
        keys = self._key_blocks(
            self._rows(block_tables, columns), len(stops), hidden[:, None, None, :]
        )
        positions = (columns[:, :, None] * size + np.arange(size)).reshape(len(stops), -1)
        foreign = np.nonzero(positions[:, :num_keys] >= ends)
        if len(foreign[0]) == 0:
            return keys
        seqs, places = (torch.from_numpy(axis).to(self.device) for axis in foreign)
        return replace(keys, foreign=(seqs, places))

    def prefill_tiles(
        self, first_token: int, num_queries: int, context_len: int, block_table: Int32Array
    ) -> Iterator[PrefillTile]:
        """`num_queries` tokens that end at context_len - 1, the first in row `first_token`."""
        for first in range(0, num_queries, QUERY_TILE):
            last = min(first + QUERY_TILE, num_queries)
            positions = np.arange(first, last, dtype=np.int64) + context_len - num_queries
            start, stop = self._first_keys(positions[:1]), int(positions[-1]) + 1
            distance = positions[:, None] - np.arange(start[0], stop)
            rows = self._rows(block_table[None], self._columns(start, distance.shape[1]))
            keys = self._key_blocks(rows, 1, self._hidden(distance))
            yield PrefillTile(first_token + first, first_token + last, keys)

    def _first_keys(self, positions: IntArray) -> IntArray:
        """The first key each position sees, rounded down to the start of its block."""
        if self.window is None:
            return np.zeros_like(positions)
        first = np.maximum(positions - self.window + 1, 0)
        return first // self.block_size * self.block_size

    def _hidden(self, distance: IntArray) -> NDArray[np.bool_]:
        """Whether a key `distance` positions before its query is not to be seen."""
        if self.window is None:
            return distance < 0
        return (distance < 0) | (distance >= self.window)

    def _columns(self, starts: IntArray, num_keys: int) -> IntArray:
        """[R, blocks] of the block tables."""
        return (starts // self.block_size)[:, None] + np.arange(-(-num_keys // self.block_size))

    def _rows(self, block_tables: Int32Array, columns: IntArray) -> IntArray:
        """[2 * R * Hkv * blocks]."""
        blocks = np.take_along_axis(block_tables, columns, axis=1).astype(np.int64)
        # A head's keys and values side by side: torch splits the gather and the products over
        # threads at the same heads, so that a core finds in its cache what it gathered.
        heads = np.arange(2 * self.num_kv_heads).reshape(2, -1).T[:, :, None]
        return (blocks[:, None, None, :] * 2 * self.num_kv_heads + heads).reshape(-1)

    def _key_blocks(self, rows: IntArray, num_seqs: int, hidden: NDArray[np.bool_]) -> KeyBlocks:
        mask = torch.zeros(hidden.shape, dtype=self.dtype)
        mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
        return KeyBlocks(
            rows=torch.from_numpy(rows).to(self.device),
            num_seqs=num_seqs,
            num_kv_heads=self.num_kv_heads,
            num_keys=hidden.shape[-1],
            mask=mask.to(self.device),
        )
