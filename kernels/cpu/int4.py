"""The int4 weight of the AMX kernel, kernels/cpu/int4_linear.cpp, which says how it multiplies.

    packed  uint8 [N / 32, K / step, 2, step * 8]   4-bit values; step 32 inputs, int8 rows 64
    scales  float32 [N / 32, K / g, 2, 16]
    zeros   uint8, shaped like scales

0.54 bytes per weight (groups of 128) and no second form: a row's result is the same among any other rows. The
layout depends on nothing but the shape, so it may be stored.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import check_dense, library

PANELS = 2  # of 16 outputs, multiplied together
PANEL = 16
GROUP_SIZES = (32, 64, 128, 256)  # those the kernel is compiled for


@dataclass(frozen=True, slots=True)
class AmxInt4Weight:
    """One packed weight of K inputs and N outputs."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    int8_activations: bool
    shape: tuple[int, int]  # (N, K)


def pack_amx_int4(
    q: Tensor, zeros: Tensor, scales: Tensor, int8_activations: bool
) -> AmxInt4Weight:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N]; g of GROUP_SIZES."""
    (num_inputs, num_outputs), groups = q.shape, scales.shape[0]
    group_size = num_inputs // groups
    assert group_size in GROUP_SIZES
    padding = -num_outputs % (PANELS * PANEL)
    q, zeros, scales = (F.pad(part, (0, padding)) for part in (q, zeros, scales.float()))
    return AmxInt4Weight(
        packed=_pack(q, 64 if int8_activations and group_size % 64 == 0 else 32, int8_activations),
        scales=_by_panels(scales),
        zeros=_by_panels(zeros),
        group_size=group_size,
        int8_activations=int8_activations,
        shape=(num_outputs, num_inputs),
    )


def amx_int4_linear(x: Tensor, weight: AmxInt4Weight, bias: Tensor | None) -> Tensor:
    """x bf16 [M, K], rows dense -> [M, N]."""
    native = library()
    assert native is not None
    num_outputs, num_inputs = weight.shape
    assert x.dtype == torch.bfloat16, x.dtype
    assert x.stride(1) == 1
    if bias is not None:
        check_dense(bias, (num_outputs,))
    y = x.new_empty(x.shape[0], num_outputs)
    if len(x) == 0:  # a tile of no rows is an instruction fault
        return y
    native.manta_int4_linear(
        x.data_ptr(),
        weight.packed.data_ptr(),
        weight.scales.data_ptr(),
        weight.zeros.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        num_inputs,
        num_outputs,
        x.stride(0),
        weight.group_size,
        weight.int8_activations,
        torch.get_num_threads(),
    )
    return y


def _pack(q: Tensor, step: int, int8: bool) -> Tensor:
    """A tile row holds 4 bytes of depth per output: 2 bf16 inputs or 4 of int8. Tile rows that
    follow each other share a word: four nibbles of 16 bits, or two of 8.
    """
    rows = 2 if int8 else 4
    # [K / 8, tile rows, inputs of a row, panels, 16] -> [panels, K / 8, 16, inputs, tile rows]
    nibbles = q.view(-1, rows, 8 // rows, q.shape[1] // PANEL, PANEL).permute(3, 0, 4, 2, 1)
    low, high = nibbles[..., 0::2], nibbles[..., 1::2]
    packed = (low | high << 4).reshape(-1, PANELS, q.shape[0] // step, step * 8)
    return packed.transpose(1, 2).contiguous()


def _by_panels(values: Tensor) -> Tensor:
    """[K / g, N] -> [N / 32, K / g, 2, 16]."""
    return values.view(values.shape[0], -1, PANELS, PANEL).transpose(0, 1).contiguous()
