"""Unsigned values of 2, 4 or 8 bits in int32 words, in order: value i at bits `bits * i`.

AWQ gemm's own order is engine/weights/awq.py's business. The host's bytes are little-endian, as
safetensors' are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.weights.awq import BLOCK_WORDS

WORD_BITS = 32


def values_per_word(bits: int) -> int:
    assert bits in (2, 4, 8)
    return WORD_BITS // bits


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 [R, V] -> int32 [R, ceil(V / values per word)]; zeros fill the last word."""
    padded = F.pad(values, (0, -values.shape[1] % values_per_word(bits)))
    per_byte = 8 // bits
    fields = padded.reshape(len(values), -1, per_byte)
    data = fields[..., 0].clone()
    for field in range(1, per_byte):
        data |= fields[..., field] << (bits * field)
    return data.contiguous().view(torch.int32)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, W * values per word]."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    mask = (1 << bits) - 1
    return torch.stack([(data >> at) & mask for at in range(0, 8, bits)], dim=-1).flatten(1)


def pack_columns(values: Tensor, bits: int) -> Tensor:
    """uint8 [V, C] -> int32 [ceil(V / values per word), C]."""
    return pack_rows(values.t().contiguous(), bits).t().contiguous()


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """int32 [W, C] -> uint8 [W * values per word, C]."""
    per_word, (rows, columns) = values_per_word(bits), words.shape
    values = torch.empty(rows, per_word, columns, dtype=torch.uint8)
    step = max(1, BLOCK_WORDS // max(1, columns))
    mask = (1 << bits) - 1
    for block, out in zip(torch.split(words, step), torch.split(values, step), strict=True):
        for at in range(per_word):
            out[:, at] = (block >> (bits * at)) & mask
    return values.flatten(0, 1)


def word_slice(values: slice, bits: int) -> tuple[slice, slice]:
    """The words that hold a run of values, and that run within them once unpacked."""
    per_word = values_per_word(bits)
    words = slice(values.start // per_word, -(-values.stop // per_word))
    first = values.start - words.start * per_word
    return words, slice(first, first + values.stop - values.start)
