"""W4A16Weight: a 4-bit weight as the Triton kernels read it, and packing it. Without triton.

    words   int32 [N/64, K/64, 64, 8]   q[n, 32w + 16s + 8h + 2l + p] of a 64 x 64 tile is nibble
                                        4p + 2s + h of its word [n, 4w + l]
    scales  [groups, N]                 in the activations' dtype
    zeros   uint8 [groups, N]           None when every one is 8

A word holds what one lane of the matrix unit wants of 32 inputs (l: lane % 4, p: pair, h: the
upper 8 inputs, s: step of 16), so that a tile goes from memory to the registers of a product with
no exchange between lanes. The same packing serves every tile shape. N and K are padded to whole
tiles, groups' columns to 256, the widest tile's: with zero scales, so that padding gives zeros.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu import interpreted

TILE = 64
SCALE_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class W4A16Weight:
    """One packed weight of K inputs and N outputs: w = (q - zero) * scale."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_order: Tensor | None  # int64 [K]: packed input k is the layer's input input_order[k]
    shape: tuple[int, int]  # (N, K), without padding
    group_size: int  # K when one scale serves all inputs


def is_packable(num_inputs: int, group_size: int) -> bool:
    """Whether a kernel's step, at least 32 inputs, meets one scale per output."""
    return group_size % 32 == 0 or group_size == num_inputs


def pack_w4a16(
    q: Tensor,
    zeros: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    device: str,
    input_order: Tensor | None = None,
) -> W4A16Weight:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N]; `is_packable`."""
    num_inputs, num_outputs = q.shape
    group_size = num_inputs // scales.shape[0]
    assert is_packable(num_inputs, group_size)
    device = "cpu" if interpreted() else device
    # A tensor of shape alone has no values to ask: its zeros are taken to be needed.
    symmetric = not zeros.is_meta and bool((zeros == 8).all())
    columns = (0, -num_outputs % SCALE_COLUMNS)
    return W4A16Weight(
        words=_pack(q.to(device)),
        scales=F.pad(scales.to(device, dtype), columns).contiguous(),
        zeros=None if symmetric else F.pad(zeros.to(device), columns).contiguous(),
        input_order=None if input_order is None else input_order.to(device, torch.int64),
        shape=(num_outputs, num_inputs),
        group_size=group_size,
    )


def _pack(q: Tensor) -> Tensor:
    """[K, N] values 0..15 -> words."""
    num_inputs, num_outputs = q.shape
    rows = F.pad(q.t(), (0, -num_inputs % TILE, 0, -num_outputs % TILE)).contiguous()
    n, k = rows.shape
    nibbles = rows.view(n, k // 32, 2, 2, 4, 2)  # n, w, s, h, lane, pair
    pairs = nibbles[:, :, :, 0] | (nibbles[:, :, :, 1] << 4)  # n, w, s, lane, pair
    words = pairs.permute(0, 1, 3, 4, 2).reshape(n, k // 8, 4).view(torch.int32)
    return words.view(n // TILE, TILE, k // TILE, 8).transpose(1, 2).contiguous()
