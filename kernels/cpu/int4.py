"""The int4 weight of the AMX kernel, kernels/cpu/int4_linear.cpp, which says how it multiplies.

    packed  uint8 [N / 32, K / step, 2, step * 8]   4-bit values
    scales  float32 [N / 32, K / g, 2, 16]
    zeros   uint8, shaped like scales

A step is 32 inputs, with int8 rows 64 (32 in groups of 32). 0.54 bytes per weight in groups of 128
and no second form: a row's result is the same among any other rows. The layout depends on nothing
but the shape, so it may be stored.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import check_dense, library

PANELS = 2  # of 16 outputs, multiplied together
PANEL = 16
GROUP_SIZES = (32, 64, 128, 256)  # those the kernel is compiled for
# Of 8 inputs, which two lie in the low and the high nibble of each of 4 bytes.
INPUTS_OF_BYTE_BF16 = ((0, 2), (4, 6), (1, 3), (5, 7))
INPUTS_OF_BYTE_INT8 = ((0, 4), (1, 5), (2, 6), (3, 7))
# Words packed at once, so few that torch does it in the calling thread (engine/weights/awq.py).
BLOCK_WORDS = 32767
BLOCK_OUTPUTS = 4064


@dataclass(frozen=True, slots=True)
class AmxInt4Weight:
    """One packed weight of K inputs and N outputs."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    int8_activations: bool
    input_order: Tensor | None  # int64 [K]: the rows are to come in this order of inputs
    shape: tuple[int, int]  # (N, K)


def pack_amx_int4(
    q: Tensor,
    zeros: Tensor,
    scales: Tensor,
    int8_activations: bool,
    input_order: Tensor | None = None,
) -> AmxInt4Weight:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N]; g of GROUP_SIZES."""
    (num_inputs, num_outputs), groups = q.shape, scales.shape[0]
    group_size = num_inputs // groups
    assert group_size in GROUP_SIZES
    scales = scales.float()
    if padding := -num_outputs % (PANELS * PANEL):
        q, zeros, scales = (F.pad(part, (0, padding)) for part in (q, zeros, scales))
    return AmxInt4Weight(
        packed=_pack(q, 64 if int8_activations and group_size % 64 == 0 else 32, int8_activations),
        scales=_by_panels(scales),
        zeros=_by_panels(zeros),
        group_size=group_size,
        int8_activations=int8_activations,
        input_order=input_order,
        shape=(num_outputs, num_inputs),
    )


def amx_int4_linear(x: Tensor, weight: AmxInt4Weight, bias: Tensor | None) -> Tensor:
    """x bf16 [M, K] in the weight's order of inputs, rows dense -> [M, N]."""
    native = library()
    assert native is not None
    num_outputs, num_inputs = weight.shape
    assert x.shape[1] == num_inputs
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
    """[K, N] -> [N / 32, K / step, 2, step * 8], by words: 8 inputs of one output are 4 bytes.

    A tile row holds 4 bytes of depth per output: 2 bf16 inputs or 4 of int8. Tile rows that follow
    each other share a byte.
    """
    eights, (num_inputs, num_outputs) = step // 8, q.shape
    pairs = num_outputs // (PANELS * PANEL)
    packed = torch.empty(pairs, num_inputs // step, PANELS, eights, PANEL, dtype=torch.int32)
    # Nibbles are paired to bytes eight columns at a time.
    inputs = q.contiguous().view(torch.int64).view(-1, eights, 8, num_outputs // 8)
    outputs = min(num_outputs, BLOCK_OUTPUTS)
    steps = max(1, BLOCK_WORDS // (eights * outputs))
    for columns, panels in zip(
        torch.split(inputs, outputs // 8, 3),
        torch.split(packed, outputs // (PANELS * PANEL)),
        strict=True,
    ):
        for block, out in zip(
            torch.split(columns, steps), torch.split(panels, steps, 1), strict=True
        ):
            words = _words(block, INPUTS_OF_BYTE_INT8 if int8 else INPUTS_OF_BYTE_BF16)
            out.copy_(words.view(len(block), eights, -1, PANELS, PANEL).permute(2, 0, 3, 1, 4))
    return packed.view(torch.uint8).flatten(3)


def _words(inputs: Tensor, inputs_of_byte: tuple[tuple[int, int], ...]) -> Tensor:
    """int64 [steps, step / 8, 8, N / 8], a nibble in each byte -> int32 [steps, step / 8, N]."""
    words = torch.zeros(*inputs.shape[:2], inputs.shape[3] * 8, dtype=torch.int32)
    for at, (low, high) in enumerate(inputs_of_byte):
        byte = (inputs[:, :, low] | inputs[:, :, high] << 4).view(torch.uint8)
        words |= byte.to(torch.int32) << (8 * at)
    return words


def _by_panels(values: Tensor) -> Tensor:
    """[K / g, N] -> [N / 32, K / g, 2, 16]."""
    return values.view(values.shape[0], -1, PANELS, PANEL).transpose(0, 1).contiguous()
