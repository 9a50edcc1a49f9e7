"""The internal forms of quantised weights, between checkpoint formats, quantisers and kernels.

A weight is one of these or, dense, a plain tensor [N, K]. K is in_features, N is out_features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.input_order import in_own_order


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """4 bits, one scale and zero per group of g inputs and output.

    w[n, input_order[k]] = (q[k, n] - zeros[k // g, n]) * scales[k // g, n], with q and zeros from
    0 to 15. Without an `input_order` the inputs are in their own order. An input that it names
    again is padding: there q is the zero point, so that it adds nothing.
    """

    q: Tensor  # uint8 [K, N]
    zeros: Tensor  # uint8 [K/g, N]
    scales: Tensor  # float [K/g, N]
    input_order: Tensor | None = (
        None  # int64 [K]; an input whose rows of q are all zeros may repeat
    )

    @property
    def group_size(self) -> int:
        return self.q.shape[0] // self.scales.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[1], self.q.shape[0]

    def dequantize(self) -> Tensor:
        """float32 [N, K], the inputs in their own order and without padding."""
        groups = self.q.float().view(len(self.scales), -1, self.q.shape[1])
        groups = (groups - self.zeros.float().unsqueeze(1)) * self.scales.float().unsqueeze(1)
        return in_own_order(groups.flatten(0, 1), self.input_order).t().contiguous()


@dataclass(frozen=True, slots=True)
class W8Matrix:
    """8 bits, one scale per output: w[n, k] = q[n, k] * scales[n]."""

    q: Tensor  # int8 or float8_e4m3fn [N, K]
    scales: Tensor  # float32 [N]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.q.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.q.to(torch.float32) * self.scales.float().unsqueeze(1)


Matrix = Tensor | Int4Matrix | W8Matrix
