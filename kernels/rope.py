"""Rotary position embedding of queries and keys, half-split style.

The first R of each head's D values are rotated (R == D unless the embedding is partial): value i
pairs with value i + R/2. cos and sin are [T, R] with the R/2 angles repeated twice.
"""

import torch
from torch import Tensor


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hkv, D], cos and sin [T, R] -> rotated (q, k), new tensors."""
    cos, sin = cos.unsqueeze(1).to(q.dtype), sin.unsqueeze(1).to(q.dtype)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned
