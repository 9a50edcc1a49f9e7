"""The int4 weight for torch's own kernels: any device, any dtype.

Keeps up to two forms, because no single one of torch's CPU kernels is good for few and for many
rows:

    few rows    4-bit values for aten's int4 kernel,   w = (q - 8) * scale + (8 - zero) * scale
    many rows   the dequantised values in the activations' dtype, through oneDNN
                (with int8_activations: int8 values, see kernels/int8_linear.py)

Memory per weight is 0.5 + 2 bytes (with int8_activations 0.5 + 1). float32 keeps the dequantised
values alone: the exact mode. Error of y against float64 arithmetic, relative to its norm: bf16
0.4 % at any number of rows, of which the output's rounding is 0.2; with int8_activations 1.3 % on
many rows. The packed forms are opaque and belong to one torch version and instruction set.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dense_linear import DenseWeight, dense_linear, pack_dense
from kernels.input_order import in_order, in_own_order
from kernels.int8_linear import Int8Weight, has_int8_kernel, int8_linear, pack_int8

# Most rows that go to the 4-bit kernel, which does not use AMX. benchmarks.cpu_linears on two
# threads of a Xeon with AMX, ms for all layers (bf16 by F.linear, not reordered: 38, 50 at 32):
#   rows    1    2    3    4    5    6    7    8   12   16   24   32   64  128  256
#   int4   12   14   15   16   26   26   26   29   41   54
#   bf16   28   28   28   28   27   28   28   28   28   29   33   32   40   52   67
#   int8   20   20   21   21   21   22   21   22   24   23   29   31   37   53   81
# and one product of 4096 x 4096 on two threads with AVX512 alone, bf16 not reordered:
#   int4 0.23 0.30      0.42                0.84      1.70
#   bf16 1.54 1.29      1.26                1.44      1.75      2.42 3.52 5.98
#   int8 0.23 0.28      0.33                0.44      0.65      0.90 1.52 2.87
MAX_INT4_ROWS_AMX = 6
MAX_INT4_ROWS_AVX512 = 8
MAX_INT4_ROWS_INT8 = 4  # where int8 rows are allowed; up to here exact activations cost nothing
INT4_GROUP_SIZES = (32, 64, 128, 256)  # those of the 4-bit kernel
INT4_OUTPUT_MULTIPLE = 16  # it needs N in whole tiles
# Dequantised at once. Temporaries stay in the L2 cache, and torch computes on so few in the calling
# thread: 14 ms for 1024 x 5632 against 29 for all of it. Two threads that meet after every
# operation take 10, but seconds when they share the cores with others, because they spin.
BLOCK_VALUES = 32767


@dataclass(frozen=True, slots=True)
class FewRows:
    """The 4-bit kernel's operands, for up to `max_rows` rows."""

    max_rows: int
    packed: Tensor
    scales_zeros: Tensor  # [K/g, N, 2] scale and (8 - zero) * scale
    group_size: int
    input_order: Tensor | None  # int64 [K]


@dataclass(frozen=True, slots=True)
class AtenInt4Weight:
    """One packed weight of K inputs and N outputs, for torch's kernels."""

    few_rows: FewRows | None
    many_rows: DenseWeight | Int8Weight
    shape: tuple[int, int]  # (N, K)

    @property
    def int8_activations(self) -> bool:
        return isinstance(self.many_rows, Int8Weight)


def pack_aten_int4(
    q: Tensor,
    zeros: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    device: str,
    int8_activations: bool = False,
    input_order: Tensor | None = None,
) -> AtenInt4Weight:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N], input_order int64 [K].

    `int8_activations` has no effect in float32 (exact) and where no int8 kernel exists. The
    dequantised values lie in the inputs' own order, so that only few rows are put in another.
    """
    in_features, out_features = q.shape
    group_size = in_features // scales.shape[0]
    offsets = (8.0 - zeros.float()) * scales.float()
    # Both forms start from the 4-bit kernel's rounded scales and offsets. What is left between
    # them is one rounding of each dequantised value to `dtype` (and int8's, where asked for):
    # y moves by about 0.2 % in bf16 when a step's rows cross max_rows, by nothing elsewhere.
    scales, offsets = scales.to(dtype), offsets.to(dtype)
    int8_activations &= has_int8_kernel(device, dtype)
    values = _by_output(q)
    # What is added up or rounded once more starts from float32.
    wide = int8_activations or input_order is not None
    weight = _dequantize(values, scales, offsets, torch.float32 if wide else dtype)
    few_rows = None
    if device == "cpu" and dtype != torch.float32 and _is_served(group_size, out_features):
        max_rows = MAX_INT4_ROWS_INT8 if int8_activations else _max_int4_rows()
        few_rows = _pack_few_rows(values, scales, offsets, max_rows, input_order)
    weight = in_own_order(weight.t(), input_order).t()
    return AtenInt4Weight(
        few_rows=few_rows,
        many_rows=pack_int8(weight) if int8_activations else pack_dense(weight.to(device, dtype)),
        shape=(out_features, weight.shape[1]),
    )


def aten_int4_linear(x: Tensor, weight: AtenInt4Weight, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype."""
    assert x.shape[1] == weight.shape[1]
    few = weight.few_rows
    if few is not None and x.shape[0] <= few.max_rows:
        y: Tensor = torch._weight_int4pack_mm_for_cpu(
            in_order(x, few.input_order), few.packed, few.group_size, few.scales_zeros
        )
        return y if bias is None else y.add_(bias)
    if isinstance(weight.many_rows, Int8Weight):
        return int8_linear(x, weight.many_rows, bias)
    return dense_linear(x, weight.many_rows, bias)


def _by_output(q: Tensor) -> Tensor:
    """uint8 [K, N] -> int32 [N, K]."""
    in_features, out_features = q.shape
    if out_features % 4:
        return q.t().int().contiguous()
    # Four outputs of an input move as one word: 4 ms for 1024 x 5632, and 10 byte by byte.
    words = q.contiguous().view(torch.int32).t().contiguous()
    fours = words.view(torch.uint8).view(-1, in_features, 4).permute(0, 2, 1)
    return fours.to(torch.int32, memory_format=torch.contiguous_format).view(-1, in_features)


def _dequantize(values: Tensor, scales: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """values [N, K], scales and offsets [K/g, N] -> [N, K]."""
    scales, offsets = (each.t().float().unsqueeze(2) for each in (scales, offsets))
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    rows = max(1, BLOCK_VALUES // values.shape[1])
    parts = (torch.split(each, rows) for each in (values, scales, offsets, weight))
    for block, scale, offset, out in zip(*parts, strict=True):
        groups = block.view(*scale.shape[:2], -1).float().sub_(8.0).mul_(scale).add_(offset)
        out.copy_(groups.view(out.shape))
    return weight


def _is_served(group_size: int, out_features: int) -> bool:
    """Whether the 4-bit kernel takes the shape; else the dequantised values do every row."""
    return group_size in INT4_GROUP_SIZES and out_features % INT4_OUTPUT_MULTIPLE == 0


def _max_int4_rows() -> int:
    return MAX_INT4_ROWS_AMX if torch.cpu._is_amx_tile_supported() else MAX_INT4_ROWS_AVX512


def _pack_few_rows(
    values: Tensor, scales: Tensor, offsets: Tensor, max_rows: int, input_order: Tensor | None
) -> FewRows:
    return FewRows(
        max_rows=max_rows,
        packed=torch._convert_weight_to_int4pack_for_cpu(values, 1),
        scales_zeros=torch.stack((scales, offsets), dim=2),
        group_size=values.shape[1] // scales.shape[0],
        input_order=input_order,
    )
