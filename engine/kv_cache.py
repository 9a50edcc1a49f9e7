"""KVCache: one rank's keys and values of each of its layers, in blocks.

Which block belongs to which sequence is the scheduler's affair.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # the decoder imports this module
    from engine.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class KVCache:
    """One tensor per layer, [num_blocks, 2 * kv heads of the rank, block_size, D].

    The heads of the keys come first, then those of the values (kernels/attention.py).
    """

    layers: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        spec: "DecoderSpec",
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
        tp: int,
        num_layers: int | None = None,
    ) -> "KVCache":
        """For `num_layers` of the model's layers; None: all.

        Zeroed, so that a never written slot cannot hold a NaN that survives masking.
        """
        shape = (num_blocks, 2 * num_rank_kv_heads(spec, tp), block_size, spec.head_dim)
        return cls(
            tuple(_zeros(shape, dtype, device) for _ in range(num_layers or spec.num_layers))
        )


def bytes_per_block(
    spec: "DecoderSpec",
    block_size: int,
    dtype: torch.dtype,
    tp: int,
    num_layers: int | None = None,
) -> int:
    """Bytes that one block takes on each rank, over its layers (None: all)."""
    values = block_size * num_rank_kv_heads(spec, tp) * spec.head_dim
    return 2 * (num_layers or spec.num_layers) * values * dtype.itemsize


def num_rank_kv_heads(spec: "DecoderSpec", tp: int) -> int:
    """KV heads on each rank; with more ranks than heads, several ranks hold the same one."""
    return max(1, spec.num_kv_heads // tp)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # calloc: pages become resident when a block is first used. torch.zeros writes them all at
    # once: for a 2 GiB cache 1 to 5 s (2 cores), and the memory even while nothing runs.
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
