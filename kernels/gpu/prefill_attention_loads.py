"""What the attention of chunks reads for a tile of positions: its keys and its values.

Quantised ones become float16 (float32 where EXACT), c * scale + z of kernels/gpu/kv_unpack.py:
unlike in decode there are as many scores as elements of a tile, and two elements take one
instruction (scales and zeros in the scores, four per score, made the loop a fifth longer). z has
one rounding however far from 0 the values lie: scale times a power of two is exact. Values come as
[BLOCK_D, BLOCK_N], because the lanes of a matrix unit take them so from their words: as the first
operand of V^T P^T they never pass through shared memory. Plain keys and values stay
[BLOCK_N, BLOCK_D], operands where they were copied to.
"""

import triton
import triton.language as tl

from kernels.gpu.flags import INTERPRET
from kernels.gpu.kv_unpack import unpack_k, unpack_vt


@triton.jit
def load_plain_tile(
    cache_ptr, table_ptr, head, key, end,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_N, BLOCK_D] of positions from `key`; MASKED: those from `end` are 0."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    block = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
    slot = (block * (2 * HKV) + head) * BLOCK_SIZE + key % BLOCK_SIZE
    pointers = cache_ptr + slot * D + (offs_n[:, None] * D + offs_d[None, :])
    present = (offs_d < D)[None, :]
    if MASKED:
        present &= (key + offs_n < end)[:, None]
    values = _load(pointers, present, MASKED or BLOCK_D != D)
    return values.to(tl.float32) if INTERPRET else values


@triton.jit
def load_quantized_tile(
    k_ptr, v_ptr, params_ptr, table_ptr, head, key, end,
    HKV: tl.constexpr, F: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr, POLICY: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_N, BLOCK_D] and values [BLOCK_D, BLOCK_N]; MASKED: values from `end` are 0.

    BLOCK_F is the power of two from F on, BLOCK_D the same, or twice that for 4 bits.
    """
    offs_n = tl.arange(0, BLOCK_N)
    block = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
    slot = (block * HKV + head) * BLOCK_SIZE + key % BLOCK_SIZE
    words = tl.arange(0, BLOCK_F // 4)
    k_ptrs = k_ptr + slot * (F // 4) + (offs_n[:, None] * (F // 4) + words[None, :])
    k_words = _load(k_ptrs, (words < F // 4)[None, :], BLOCK_F != F)
    rows = tl.arange(0, BLOCK_N // 4)
    offs_f = tl.arange(0, BLOCK_F)
    v_ptrs = v_ptr + slot * (F // 4) + (rows[:, None] * F + offs_f[None, :])
    v_words = _load(v_ptrs, (offs_f < F)[None, :], BLOCK_F != F)
    params_ptrs = params_ptr + (slot + block * (HKV * BLOCK_SIZE)) + offs_n
    k_params = tl.load(params_ptrs)
    v_params = tl.load(params_ptrs + HKV * BLOCK_SIZE)
    k = _dequantize(unpack_k(k_words, POLICY, EXACT), k_params[:, None], POLICY)
    v = _dequantize(unpack_vt(v_words, POLICY, EXACT), v_params[None, :], POLICY)
    if MASKED:
        v = tl.where((key + offs_n < end)[None, :], v, 0.0)
    return k, v


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    return tl.load(pointers, mask=mask, other=0) if MASKED else tl.load(pointers)


@triton.jit
def _dequantize(centred, params, POLICY: tl.constexpr):
    """In the type of the centred integers, which is what the products are made of."""
    scale = params.to(tl.int16).to(tl.float16, bitcast=True).to(centred.dtype)
    values = centred * scale
    if POLICY != 16:
        zero = (params >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(centred.dtype)
        values += zero + scale * (128.0 if POLICY == 8 else 8.0)
    return values
