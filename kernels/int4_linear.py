"""W4A16 linear: y = x @ ((q - zero) * scale) + bias with 4-bit weights in groups along K.

`pack_int4` takes the checkpoint-independent form (q [K, N] 0..15, zeros and scales [K/g, N]).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """One packed weight of K inputs and N outputs."""

    dense: Tensor  # [N, K]
    int8_activations: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as a dense weight's."""
        return self.dense.shape[0], self.dense.shape[1]


def pack_int4(
    q: Tensor,
    zeros: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    device: str,
    int8_activations: bool = False,
) -> Int4Weight:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N] -> what `int4_linear` multiplies by."""
    group_size = q.shape[0] // scales.shape[0]
    assert q.shape[0] == group_size * scales.shape[0]
    assert zeros.shape == scales.shape
    wide = q.to(torch.int16).view(-1, group_size, q.shape[1]) - zeros.to(torch.int16).unsqueeze(1)
    dense = (wide.float() * scales.float().unsqueeze(1)).view_as(q)
    return Int4Weight(dense.t().contiguous().to(device, dtype), int8_activations)


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype."""
    return F.linear(x, weight.dense, bias)
