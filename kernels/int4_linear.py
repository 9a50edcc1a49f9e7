"""W4A16 linear: y = x @ ((q - zero) * scale) + bias, 4-bit weights in groups of g inputs.

`pack_int4` takes the checkpoint-independent form, q [K, N] 0..15 with zeros and scales [K/g, N].
Error of y against float64 arithmetic, relative to its norm: bf16 0.4 %, of which the output's
rounding is 0.2; with int8_activations about 0.7 % on a CPU with AMX and 1.3 % on others; float32
computes with the dequantised values and is the exact mode. Times: benchmarks/cpu_linears.py.

A GPU multiplies some hundred rows by the packed weight (kernels/gpu/w4a16_kernel.py), and more
after dequantising it; a weight whose groups its kernels cannot take is kept dequantised.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from kernels.activation import silu_mul
from kernels.cpu import library
from kernels.cpu.int4 import GROUP_SIZES, AmxInt4Weight, amx_int4_linear, pack_amx_int4
from kernels.gpu import interpreted
from kernels.gpu.w4a16_pack import W4A16Weight, is_packable, pack_w4a16
from kernels.input_order import in_order
from kernels.int4_aten import AtenInt4Weight, aten_int4_linear, pack_aten_int4
from kernels.partials import Partials

Int4Weight = AmxInt4Weight | AtenInt4Weight | W4A16Weight


def pack_int4(
    q: Tensor,
    zeros: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    device: str,
    int8_activations: bool = False,
    input_order: Tensor | None = None,
) -> Int4Weight:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N] -> what `int4_linear` multiplies by.

    `int8_activations` has no effect in float32 (exact) and where no int8 kernel exists.
    `input_order` int64 [K]: input k of q is the layer's input input_order[k]. A padding row, whose
    q is the zero point, may name any of them again, so that K exceeds the layer's inputs.
    """
    group_size = q.shape[0] // scales.shape[0]
    assert q.shape == (group_size * scales.shape[0], scales.shape[1])
    assert zeros.shape == scales.shape
    on_gpu = torch.device(device).type == "cuda" or interpreted()
    if on_gpu and is_packable(q.shape[0], group_size):
        return pack_w4a16(q, zeros, scales, dtype, device, input_order)
    if device == "cpu" and group_size not in GROUP_SIZES and group_size % GROUP_SIZES[0] == 0:
        repeats = group_size // _cpu_group_size(group_size)
        zeros, scales = zeros.repeat_interleave(repeats, 0), scales.repeat_interleave(repeats, 0)
        group_size //= repeats
    tiled = device == "cpu" and dtype == torch.bfloat16 and group_size in GROUP_SIZES
    if tiled and library() is not None:
        return pack_amx_int4(q, zeros, scales, int8_activations, input_order)
    return pack_aten_int4(q, zeros, scales, dtype, device, int8_activations, input_order)


def _cpu_group_size(group_size: int) -> int:
    """The largest that the CPU's kernels take and that divides the group's."""
    return max(size for size in GROUP_SIZES if group_size % size == 0)


@overload
def int4_linear(
    x: Tensor, weight: Int4Weight, bias: Tensor | None, partial: Literal[False] = False
) -> Tensor: ...


@overload
def int4_linear(
    x: Tensor, weight: Int4Weight, bias: Tensor | None, partial: bool
) -> Tensor | Partials: ...


def int4_linear(
    x: Tensor, weight: Int4Weight, bias: Tensor | None, partial: bool = False
) -> Tensor | Partials:
    """x [M, K] -> [M, N] in x's dtype. `partial`: Partials will do as well."""
    if isinstance(weight, W4A16Weight):
        from kernels.gpu.w4a16 import w4a16_linear

        return w4a16_linear(in_order(x, weight.input_order), weight, bias, partial)
    if isinstance(weight, AmxInt4Weight):
        return amx_int4_linear(in_order(x, weight.input_order), weight, bias)
    return aten_int4_linear(x, weight, bias)


def int4_silu_mul(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [M, K], outputs of `weight` gate's and then up's -> silu(gate) * up, [M, N/2]."""
    if isinstance(weight, W4A16Weight):
        from kernels.gpu.w4a16 import is_gated_best, w4a16_silu_mul

        if is_gated_best(x, weight):
            return w4a16_silu_mul(in_order(x, weight.input_order), weight, bias)
    return silu_mul(int4_linear(x, weight, bias, partial=True))
