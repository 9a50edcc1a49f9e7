"""BlockManager: which KV blocks are free, who shares them, and which content can be reused.

Every block is either free (in the LRU queue) or referenced (count = tables that hold it), never
both. A full block may carry a hash of everything up to its end; a free block keeps its hash
until it is handed out again, so that a later sequence with the same prefix can take it back.
Knows token ids and block ids only: no tensors, no sequences' other state.
"""

from collections import OrderedDict
from collections.abc import Iterator

from engine.prefix import block_hash, root_hash
from engine.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # Ascending ids first: a fresh cache hands out neighbours, which a CPU reads faster.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def num_missing_blocks(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks the table of `seq` lacks to hold its first `num_tokens` tokens."""
        return -(-num_tokens // self.block_size) - len(seq.block_table)

    def extend(self, seq: Sequence, num_blocks: int) -> None:
        """Append `num_blocks` free blocks to the table of `seq`."""
        for _ in range(num_blocks):
            block_id, _ = self._free.popitem(last=False)
            self._forget(block_id)
            self._ref_counts[block_id] = 1
            seq.block_table.append(block_id)

    def find_prefix(self, seq: Sequence) -> list[int]:
        """Cached blocks that hold the start of `seq`.

        At least one token is left uncomputed, since its logits are needed.
        """
        block_ids: list[int] = []
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return block_ids
        num_blocks = (len(seq.token_ids) - 1) // self.block_size
        for index in range(num_blocks):
            block_id = self._cached.get(self._block_hash(seq, index))
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def count_free(self, block_ids: list[int]) -> int:
        """How many of these cached blocks would leave the free queue when taken."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def take_prefix(self, seq: Sequence, block_ids: list[int]) -> None:
        """Start the empty table of `seq` with the blocks `find_prefix` found."""
        assert not seq.block_table
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1
        seq.block_table.extend(block_ids)
        seq.num_cached_blocks = len(block_ids)

    def cache_full_blocks(self, seq: Sequence) -> None:
        """Let others find the blocks of `seq` that became full."""
        if not self.enable_prefix_caching:
            return
        num_known = min(seq.num_computed_tokens, len(seq.token_ids))
        while seq.num_cached_blocks < num_known // self.block_size:
            block_id = seq.block_table[seq.num_cached_blocks]
            block_hash = self._block_hash(seq, seq.num_cached_blocks)
            if block_hash not in self._cached:
                self._hashes[block_id] = block_hash
                self._cached[block_hash] = block_id
            seq.num_cached_blocks += 1

    def release(self, seq: Sequence) -> None:
        """Give back every block of `seq`, the last first: a prefix outlives what follows it."""
        for block_id in reversed(seq.block_table):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)
        seq.block_table.clear()
        seq.num_cached_blocks = 0

    def free_hashes(self) -> Iterator[bytes]:
        """Hashes of the cached blocks that no table holds, the last to be forgotten first."""
        for block_id in reversed(self._free):
            if (content := self._hashes[block_id]) is not None:
                yield content

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Assert the invariants of the module docstring against the tables in use."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block_id in table:
                counts[block_id] += 1
        assert counts == self._ref_counts, "reference counts differ from the block tables"
        assert {b for b, n in enumerate(counts) if n == 0} == set(self._free)
        assert all(self._hashes[block_id] == key for key, block_id in self._cached.items())

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block_id] = None

    def _block_hash(self, seq: Sequence, index: int) -> bytes:
        while index >= len(seq.block_hashes):
            hashes = seq.block_hashes
            parent = hashes[-1] if hashes else root_hash(seq.request.cache_salt)
            start = len(hashes) * self.block_size
            hashes.append(block_hash(parent, seq.token_ids[start : start + self.block_size]))
        return seq.block_hashes[index]
