"""A W4A16Weight as a plain matrix, for cuBLAS to multiply many rows by.

From about 768 rows on that is faster than unpacking the weight anew for every tile of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.flags import INTERPRET
from kernels.gpu.w4a16_pack import W4A16Weight
from kernels.gpu.w4a16_tiles import choose_block_k, group_constants
from kernels.gpu.w4a16_unpack import (
    SCALE_COLUMNS,
    centre,
    column_offsets,
    per_input,
    row_offsets,
    step_offset,
    unpack_int4,
)

BLOCK_N, BLOCK_K = 64, 128


@triton.jit
def _dequantise_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,  # or None
    out_ptr,  # [N, K]
    N,
    K,
    GROUP: tl.constexpr,  # 0: one group
    GROUPS: tl.constexpr,  # of a program
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float32 if INTERPRET else out_ptr.dtype.element_ty
    step = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets = row_offsets(offs_n, N, K)[:, None] + column_offsets(BLOCK_K)[None, :]
    words = tl.load(words_ptr + step_offset(step, BLOCK_K) + offsets)
    group = step * BLOCK_K // GROUP if GROUP > 0 else 0
    stride_g = tl.cdiv(N, SCALE_COLUMNS) * SCALE_COLUMNS
    at = group * stride_g + offs_n[:, None] + tl.arange(0, GROUPS)[None, :] * stride_g
    zero = None
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + at)
    weight = centre(unpack_int4(words, DTYPE, BLOCK_N, BLOCK_K), zero)
    weight = (weight * per_input(tl.load(scales_ptr + at).to(DTYPE), BLOCK_K)).to(
        out_ptr.dtype.element_ty
    )
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(out_ptrs, weight, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def dequantise(weight: W4A16Weight) -> Tensor:
    """[N, K] in the dtype of its scales.

    A new tensor each time: it lives for one product, after which torch's allocator has its memory
    for the next one, inside a CUDA graph too. A buffer of our own would outlive its use, and one
    that had to grow would leave captured graphs with the old one.
    """
    n, k = weight.shape
    out = weight.scales.new_empty(n, k)
    block_k = choose_block_k(BLOCK_K, k, weight.group_size)
    grid = (triton.cdiv(k, block_k), triton.cdiv(n, BLOCK_N))
    _dequantise_kernel[grid](
        weight.words, weight.scales, weight.zeros, out, n, k,
        **group_constants(k, weight.group_size, block_k), BLOCK_N=BLOCK_N, BLOCK_K=block_k,
    )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    forms = ((bf16, 128, False), (bf16, 128, True), (bf16, 32, True), (f16, 64, True))
    return [
        dequantise_case(dtype, 4096, 4096, group_size, zeros)
        for dtype, group_size, zeros in (*forms, (f32, 128, True))
    ]


def dequantise_case(
    dtype: torch.dtype, n: int, k: int, group_size: int, zeros: bool
) -> CompileCase:
    block_k = choose_block_k(BLOCK_K, k, group_size)
    name = f"{str(dtype).removeprefix('torch.')} {n}x{k} g{group_size}"
    return CompileCase(
        name + " zeros" * zeros,
        _dequantise_kernel,
        (torch.int32, dtype, torch.uint8 if zeros else None, dtype, n, k),
        group_constants(k, group_size, block_k) | {"BLOCK_N": BLOCK_N, "BLOCK_K": block_k},
    )
