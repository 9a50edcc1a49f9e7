"""The AWQ "gemm" storage layout: packing and unpacking.

K is in_features, N is out_features, g the group size along K. A checkpoint stores
`qweight` int32 [K, N/8], `qzeros` int32 [K/g, N/8] and `scales` fp16 [K/g, N]; the weight is
w[k, n] = (q[k, n] - zeros[k // g, n]) * scales[k // g, n] with q and zeros unsigned 4-bit.
This module knows tensors only: no files, no configs, no sharding, no kernels.
"""

import torch
from torch import Tensor

NIBBLES_PER_WORD = 8

# Nibble i (bits 4i..4i+3) of word c holds column 8c + COLUMN_OF_NIBBLE[i]. AutoAWQ interleaves
# even and odd columns so that its fp16x2 kernels unpack two neighbours with one mask.
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)

# Words unpacked at once. Temporaries stay in the L2 cache, and torch computes on so few in the
# calling thread: 4 ns a word on a quiet core. Two threads that meet after every operation take 3,
# but 40 of CPU when they have to share the cores with others, because they spin.
BLOCK_WORDS = 32767


def unpack_awq(qweight: Tensor, qzeros: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [K, N/8] and [K/g, N/8] -> q uint8 [K, N] and zeros uint8 [K/g, N]."""
    return _unpack_columns(qweight), _unpack_columns(qzeros)


def pack_awq(q: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """q uint8 [K, N] and zeros uint8 [K/g, N] -> int32 [K, N/8] and [K/g, N/8]."""
    return _pack_columns(q), _pack_columns(zeros)


def _pack_columns(values: Tensor) -> Tensor:
    """Unsigned nibbles [R, N] -> int32 words [R, N/8]."""
    rows, columns = values.shape
    if columns % NIBBLES_PER_WORD:
        raise ValueError(f"{columns} columns are not a multiple of {NIBBLES_PER_WORD}")
    nibbles = values.reshape(rows, -1, NIBBLES_PER_WORD).to(torch.int32)
    words = torch.zeros(nibbles.shape[:2], dtype=torch.int32, device=values.device)
    for nibble, column in enumerate(COLUMN_OF_NIBBLE):
        words |= nibbles[:, :, column] << (4 * nibble)
    return words


def _unpack_columns(words: Tensor) -> Tensor:
    """int32 words [R, N/8] -> unsigned nibbles, uint8 [R, N]."""
    bytes_of = torch.empty(words.shape, dtype=torch.int64, device=words.device)
    rows = max(1, BLOCK_WORDS // max(1, words.shape[1]))
    for block, out in zip(torch.split(words, rows), torch.split(bytes_of, rows), strict=True):
        even, odd = _spread(block & 0xFFFF), _spread((block >> 16) & 0xFFFF)
        torch.bitwise_or(even, odd.bitwise_left_shift_(8), out=out)
    return bytes_of.view(torch.uint8)


def _spread(halves: Tensor) -> Tensor:
    """Four nibbles next to each other -> int64, one in the low bits of every 16."""
    spread = halves.to(torch.int64)
    spread.bitwise_or_(spread << 24).bitwise_and_(0x000000FF_000000FF)
    return spread.bitwise_or_(spread << 12).bitwise_and_(0x000F000F_000F000F)
