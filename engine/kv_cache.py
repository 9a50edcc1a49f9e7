"""KVCache: one rank's keys and values of each of its layers, in blocks, plain or quantised.

Which block belongs to which sequence is the scheduler's affair.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.errors import ConfigError
from kernels.gpu import has_gpu
from kernels.kv_layout import RUN, LayerCache, QuantizedKV, bytes_per_token, lazy_zeros

if TYPE_CHECKING:  # the decoder imports this module
    from engine.models.spec import DecoderSpec

FP8_CAPABILITY = (8, 9)  # of a GPU that converts to and from e4m3: Ada, Hopper and later


@dataclass(frozen=True, slots=True)
class KVCache:
    """Plain, a layer is one tensor [num_blocks, 2 * kv heads of the rank, block_size, D].

    The heads of the keys come first, then those of the values (kernels/attention.py);
    kernels/kv_layout.py has the quantised ones.
    """

    layers: tuple[LayerCache, ...]

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
        quant_policy: int = 0,
    ) -> "KVCache":
        """For `num_layers` of the model's layers; None: all.

        Zeroed, so that a never written slot cannot hold a NaN that survives masking.
        """
        heads = num_rank_kv_heads(spec, tp)

        def layer() -> LayerCache:
            if quant_policy:
                return QuantizedKV.allocate(
                    num_blocks, heads, block_size, spec.head_dim, quant_policy, device
                )
            return lazy_zeros((num_blocks, 2 * heads, block_size, spec.head_dim), dtype, device)

        return cls(tuple(layer() for _ in range(num_layers or spec.num_layers)))


def bytes_per_block(
    spec: "DecoderSpec",
    block_size: int,
    dtype: torch.dtype,
    tp: int,
    num_layers: int | None = None,
    quant_policy: int = 0,
) -> int:
    """Bytes that one block takes on each rank, over its layers (None: all)."""
    token = 2 * spec.head_dim * dtype.itemsize
    if quant_policy:
        token = bytes_per_token(spec.head_dim, quant_policy)
    heads = (num_layers or spec.num_layers) * num_rank_kv_heads(spec, tp)
    return heads * block_size * token


def num_rank_kv_heads(spec: "DecoderSpec", tp: int) -> int:
    """KV heads on each rank; with more ranks than heads, several ranks hold the same one."""
    return max(1, spec.num_kv_heads // tp)


def check_quant_policy(spec: "DecoderSpec", quant_policy: int, device: str) -> None:
    """ConfigError when this model's heads or this GPU cannot have such a cache."""
    check_head_dim(spec, quant_policy)
    if quant_policy == 16 and device == "cuda" and has_gpu():
        capability = torch.cuda.get_device_capability()
        if capability < FP8_CAPABILITY:
            raise ConfigError(
                "quant_policy 16 (fp8) needs a GPU of compute capability 8.9 or later, not "
                f"{capability[0]}.{capability[1]}; use quant_policy 8 or 4"
            )


def check_head_dim(spec: "DecoderSpec", quant_policy: int) -> None:
    if quant_policy and spec.head_dim % RUN:
        raise ConfigError(
            f"quant_policy {quant_policy} needs a head size that is a multiple of {RUN}, this "
            f"checkpoint's is {spec.head_dim}; use quant_policy 0"
        )
