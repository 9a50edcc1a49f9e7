"""W4A16 linear: y = x @ ((q - zero) * scale) + bias, 4-bit weights in groups of g inputs.

`pack_int4` takes the checkpoint-independent form, q [K, N] 0..15 with zeros and scales [K/g, N].
Error of y against float64 arithmetic, relative to its norm: bf16 0.4 %, of which the output's
rounding is 0.2; with int8_activations about 0.7 % on a CPU with AMX and 1.3 % on others; float32
computes with the dequantised values and is the exact mode. Times: benchmarks/cpu_linears.py.
"""

import torch
from torch import Tensor

from kernels.cpu import library
from kernels.cpu.int4 import GROUP_SIZES, AmxInt4Weight, amx_int4_linear, pack_amx_int4
from kernels.int4_aten import AtenInt4Weight, aten_int4_linear, pack_aten_int4

Int4Weight = AmxInt4Weight | AtenInt4Weight


def pack_int4(
    q: Tensor,
    zeros: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    device: str,
    int8_activations: bool = False,
) -> Int4Weight:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N] -> what `int4_linear` multiplies by.

    `int8_activations` has no effect in float32 (exact) and where no int8 kernel exists.
    """
    group_size = q.shape[0] // scales.shape[0]
    assert q.shape == (group_size * scales.shape[0], scales.shape[1])
    assert zeros.shape == scales.shape
    tiled = device == "cpu" and dtype == torch.bfloat16 and group_size in GROUP_SIZES
    if tiled and library() is not None:
        return pack_amx_int4(q, zeros, scales, int8_activations)
    return pack_aten_int4(q, zeros, scales, dtype, device, int8_activations)


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype."""
    assert x.shape[1] == weight.shape[1]
    if isinstance(weight, AmxInt4Weight):
        return amx_int4_linear(x, weight, bias)
    return aten_int4_linear(x, weight, bias)
