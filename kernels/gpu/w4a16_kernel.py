"""W4A16 product on the GPU: y = x @ ((q - zero) * scale).T + bias; kernels/gpu/w4a16_pack.py packs.

Computed as W @ x.T: then the weights are the register operand of the tensor cores' product, and
what `unpack_int4` makes of a word in registers is used where it stands. q - zero is exact in 16
bits, and costs no instruction more than folding the zero point into sums of x, which cancel badly
(30 times the error in float32). `scale` says where the scale is applied:

    after    to the product of a group, in float32: at few rows the cheapest
    before   to the weights, rounded to 16 bits: no second accumulator, so for many rows
    (last)   one group for all of K: once, to the result

A product with few tiles is cut along K. Each part writes its own float32 sums (kernels/partials.py)
and whoever reads the result next adds them up.

The gated form computes silu(x @ gate.T) * (x @ up.T) of a weight whose outputs are gate's and then
up's: half of a program's rows are of each, so that a pair meets in one thread.

float32 activations are the exact mode: float32 weights and products, on the CUDA cores.
"""

import triton
import triton.language as tl

from kernels.gpu.flags import INTERPRET
from kernels.gpu.w4a16_unpack import (
    SCALE_COLUMNS,
    TILE,
    centre,
    column_offsets,
    output_of,
    per_input,
    row_offsets,
    step_offset,
    unpack_int4,
)


@triton.jit
def _prefetch_l2(pointers):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["M", "steps_per_split"])
def w4a16_kernel(
    x_ptr,  # [M, K]
    words_ptr,
    scales_ptr,
    zeros_ptr,  # or None
    bias_ptr,  # [N], or None
    out_ptr,  # [M, N]; GATED: [M, N / 2]; of several splits: float32 [splits, M, N]
    M,
    N,
    K,
    steps_per_split,
    GROUP: tl.constexpr,  # 0: one group
    GROUPS: tl.constexpr,  # of a step
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP or is a multiple of it
    SCALE_AFTER: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    GATED: tl.constexpr,
    PREFETCH: tl.constexpr,  # 128-byte lines of weights to bring to L2 before the wait
    PDL: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float32 if INTERPRET else x_ptr.dtype.element_ty
    pid_n = tl.program_id(1)
    pid_k = tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = output_of(tl.arange(0, BLOCK_N), pid_n, N, BLOCK_N, GATED)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    first = pid_k * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, BLOCK_K))

    word_ptrs = words_ptr + row_offsets(offs_n, N, K)[:, None] + column_offsets(BLOCK_K)[None, :]
    x_ptrs = x_ptr + offs_m[None, :] * K + first * BLOCK_K + offs_k[:, None]
    stride_g = tl.cdiv(N, SCALE_COLUMNS) * SCALE_COLUMNS
    offs_g = offs_n[:, None] + tl.arange(0, GROUPS)[None, :] * stride_g

    # Too narrow for asynchronous copies: fetched one step ahead by hand.
    group = first * BLOCK_K // GROUP * stride_g if GROUP > 0 else 0
    scale = tl.load(scales_ptr + group + offs_g)
    zero = None
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + group + offs_g)

    if PDL:
        if PREFETCH > 0:
            tiles: tl.constexpr = BLOCK_N // TILE
            rows = output_of(tl.arange(0, tiles) * TILE, pid_n, N, BLOCK_N, GATED)
            begin = step_offset(first, BLOCK_K)
            lines = begin + tl.arange(0, PREFETCH // tiles) * 32
            lines = tl.minimum(lines, step_offset(last, BLOCK_K) - 1)
            _prefetch_l2(words_ptr + row_offsets(rows, N, K)[:, None] + lines[None, :])
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(first, last):
        if GROUP > 0:
            next_group = tl.minimum(step + 1, last - 1) * BLOCK_K // GROUP * stride_g
            next_scale = tl.load(scales_ptr + next_group + offs_g)
            if zeros_ptr is not None:
                next_zero = tl.load(zeros_ptr + next_group + offs_g)
        # Triton 3.6 drops this hint on asynchronous copies; 3.9 passes it on.
        words = tl.load(word_ptrs + step_offset(step, BLOCK_K), eviction_policy="evict_first")
        if EVEN_K:
            xt = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0)
        else:
            mask_k = offs_k < K - step * BLOCK_K
            xt = tl.load(x_ptrs, mask=mask_m[None, :] & mask_k[:, None], other=0.0)
        xt = xt.to(DTYPE)
        weight = centre(unpack_int4(words, DTYPE, BLOCK_N, BLOCK_K), zero)
        if GROUP == 0:
            acc = tl.dot(weight, xt, acc, input_precision="ieee")
        elif SCALE_AFTER:
            product = tl.dot(weight, xt, input_precision="ieee")
            acc += product * scale.to(tl.float32)
        else:
            weight = (weight * per_input(scale.to(DTYPE), BLOCK_K)).to(DTYPE)
            acc = tl.dot(weight, xt, acc, input_precision="ieee")
        if GROUP > 0:
            scale = next_scale
            if zeros_ptr is not None:
                zero = next_zero
        x_ptrs += BLOCK_K

    if GROUP == 0:
        acc *= scale.to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        HALF: tl.constexpr = BLOCK_N // 2
        pairs = tl.permute(tl.reshape(acc, (2, HALF, BLOCK_M)), (1, 2, 0))
        gate, up = tl.split(pairs)
        # Rounded as the product and its halves are when they are computed one by one.
        gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
        offs_i = pid_n * HALF + tl.arange(0, HALF)
        out_ptrs = out_ptr + offs_m[None, :] * (N // 2) + offs_i[:, None]
        mask = mask_m[None, :] & (offs_i < N // 2)[:, None]
        tl.store(out_ptrs, (gate * up).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        out_ptrs = out_ptr + pid_k * M * N + offs_m[None, :] * N + offs_n[:, None]
        mask = mask_m[None, :] & (offs_n < N)[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
