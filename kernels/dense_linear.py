"""Dense linear: y = x @ weight.T + bias, the weight reordered once for oneDNN where that pays.

On a CPU that multiplies bf16 natively (AMX or AVX512-BF16) a bf16 weight is kept in oneDNN's
blocked layout instead of row major. That layout is opaque and belongs to one torch version and
instruction set (kernels/opaque.py). Everything else is row major [N, K].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows the blocked layout is chosen for. Four linears of a 350M layer, 1 thread, AMX, prepacked
# against F.linear: 0.75 of the time at 1 row, 0.80 at 32, 0.71 at 128, 0.64 at 256.
ROWS_HINT = 32


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """One weight of K inputs and N outputs."""

    data: Tensor  # [N, K], or the same values in oneDNN's layout
    reordered: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.data.shape[0], self.data.shape[1]


def pack_dense(weight: Tensor) -> DenseWeight:
    """weight [N, K] in the dtype and on the device it will be used."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and multiplies_bf16():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
        return DenseWeight(reordered, reordered=True)
    return DenseWeight(weight.contiguous(), reordered=False)


def dense_linear(x: Tensor, weight: DenseWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype."""
    if weight.reordered:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight.data, bias, "none", [], "")
        return y
    return F.linear(x, weight.data, bias)


def multiplies_bf16() -> bool:
    """Asked when a weight is packed, so that importing this asks nothing of the machine."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())
