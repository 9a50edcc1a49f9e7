"""W8A8 linear: int8 weights with one scale per output, int8 rows with one scale per row.

    weight[n, k] ~ qweight[n, k] * weight_scale[n],   weight_scale[n] = max_k |weight[n, k]| / 127
    x[m, k]      ~ (qx[m, k] - 128) * row_scale[m],   row_scale[m]    = max_k |x[m, k]| / 126
    y[m, n] = (sum_k (qx[m, k] - 128) * qweight[n, k]) * weight_scale[n] * row_scale[m] + bias[n]

qx is unsigned because VNNI multiplies unsigned by signed bytes: with signed rows oneDNN falls back
to code 500 times slower on a CPU without AMX. The sum is exact in int32. For bf16 x, row_scale is
rounded to bf16 before it divides x, so that multiplying by it in bf16 is right; 126 keeps that
rounding from carrying a value past 127. Rows are quantised when they arrive, each by itself: what
else is in the batch changes nothing. Rounding costs a relative error of about 1.1 % of y for
normally distributed x and weight (0.8 % each), more where one value of a row or of an output's
weights is far larger than the rest. The packed weight is opaque and belongs to one torch version
and instruction set (kernels/opaque.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_WEIGHT = 127
MAX_ROW = 126
SMALLEST_SCALE = 1e-30  # keeps a row or an output of zeros from dividing by zero
# Rows quantised, multiplied and scaled at once, so that they stay in the L2 cache between the
# elementwise passes: 1024 rows through the 350M layers take 0.88 of the time of one block.
ROW_BLOCK = 256
ZERO_POINT = 128


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """One packed weight of K inputs and N outputs."""

    packed: Tensor
    scales: Tensor  # float32 [N]
    zero_points: Tensor  # int64 [N], all 0: the kernel asks for them
    shape: tuple[int, int]  # (N, K)


def has_int8_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether int8 is worth it and right: a CPU that sums int8 products without saturating (VNNI),
    oneDNN built in, and rows of 16 bits; float32 is the exact mode.
    """
    if device != "cpu" or dtype == torch.float32:
        return False
    engines = torch.backends.quantized.supported_engines
    return "onednn" in engines and torch.cpu._is_vnni_supported()


def pack_int8(weight: Tensor) -> Int8Weight:
    """weight [N, K], any float dtype, on the CPU."""
    wide = weight.to(torch.float32, copy=True)
    scales = _scales(wide, MAX_WEIGHT)
    return pack_int8_values(wide.div_(scales).round_().to(torch.int8), scales.squeeze(1))


def pack_int8_values(values: Tensor, scales: Tensor) -> Int8Weight:
    """values int8 [N, K], scales float32 [N], on the CPU: multiplied as they are."""
    return Int8Weight(
        packed=torch.ops.onednn.qlinear_prepack(values.contiguous(), [ROW_BLOCK, values.shape[1]]),
        scales=scales,
        zero_points=torch.zeros(len(values), dtype=torch.int64),
        shape=(values.shape[0], values.shape[1]),
    )


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype."""
    assert x.shape[1] == weight.shape[1]
    if len(x) <= ROW_BLOCK:
        y = _multiply(x, weight)
    else:
        y = x.new_empty(len(x), weight.shape[0])
        for rows, part in zip(torch.split(x, ROW_BLOCK), torch.split(y, ROW_BLOCK), strict=True):
            part.copy_(_multiply(rows, weight))
    return y if bias is None else y.add_(bias)


def _multiply(x: Tensor, weight: Int8Weight) -> Tensor:
    # float16 cannot hold every scale, nor every sum that a small scale brings back into range.
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    wide = x.to(torch.float32, copy=True)
    row_scales = _scales(wide, MAX_ROW).to(dtype)
    # Truncated, x / scale + 128.5 is x / scale + 128 rounded to the nearest.
    values = wide.div_(row_scales).add_(ZERO_POINT + 0.5).to(torch.uint8)
    sums: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        values, 1.0, ZERO_POINT, weight.packed, weight.scales, weight.zero_points,
        None, 1.0, 0, dtype, "none", [], "",
    )  # fmt: skip
    return sums.mul_(row_scales).to(x.dtype)


def _scales(rows: Tensor, largest: int) -> Tensor:
    """float32 [R, K] -> [R, 1]: the value of one step when the row's extreme is `largest`."""
    return rows.abs().amax(dim=1, keepdim=True).mul_(1 / largest).clamp_min_(SMALLEST_SCALE)
