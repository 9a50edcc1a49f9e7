"""GpuStep: what the kernels are told about one step, as tensors in device memory.

The counterpart of kernels.attention.AttentionMetadata, whose arrays are the host's. Under a CUDA
graph the tensors are the graph's own and the integers are those of its bucket: rows and tokens
beyond the step's are padding, which reads nothing and stores nothing.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class GpuStep:
    """T tokens of S sequences. Decode rows (one query: token s of row s) come first."""

    input_ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    slot_mapping: Tensor  # int64 [T] block_id * block_size + offset; -1: padding, store nothing
    query_start_loc: Tensor  # int32 [S+1] prefix sums of new tokens
    context_lens: Tensor  # int32 [S] keys, the step's own included; 0: padding
    rows: Tensor  # int32 [S] of block_tables
    block_tables: Tensor  # int32 [max_num_seqs, max_blocks], lives as long as the engine
    num_decodes: int  # of the S rows, padding included
    max_query_len: int  # of the rows after them; 0 without such rows
    max_context_len: int  # no row has more keys; under a graph session_len
    block_size: int

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def num_seqs(self) -> int:
        return len(self.rows)
