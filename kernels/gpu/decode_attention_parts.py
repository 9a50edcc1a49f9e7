"""Device functions of both decode attention kernels, and the kernel that merges their splits.

Partial results: part_out float32 [S, Hq, splits, D], a split's sum of p * v, and part_stat float32
[S, Hq, splits, 2], the row maximum m (of exponents of 2) that its p are relative to, and the sum of
p. The merged row is sum(2^(m - max m) * part_out) / sum(2^(m - max m) * part_sum), in the order of
the splits.
"""

import triton
import triton.language as tl

from kernels.gpu.flags import INTERPRET, LOG2_E

# Scores of hidden keys: finite, so that no difference of two is NaN.
HIDDEN = tl.constexpr(-1e30)


@triton.jit
def split_bounds(context_len, window, split, splits, TOKENS: tl.constexpr):
    """-> (first key that any split sees, this split's tiles first:last; first >= last: none)."""
    first_key = 0 if window is None else tl.maximum(context_len - window, 0)
    first_tile = first_key // TOKENS
    num_tiles = tl.cdiv(context_len, TOKENS)
    per_split = tl.cdiv(num_tiles - first_tile, splits)
    first = first_tile + split * per_split
    return first_key, first, tl.minimum(first + per_split, num_tiles)


@triton.jit
def cap_scores(scores, soft_cap):
    """cap * tanh(x / cap) of scores x that are exponents of 2, x * log2(e); so is the result."""
    grown = exp2(scores * (2.0 / soft_cap))  # e^2y, where tanh(y) = 1 - 2 / (1 + e^2y)
    return (soft_cap * LOG2_E) * (1.0 - 2.0 / (1.0 + grown))


@triton.jit
def exp2(x):
    """Without Triton's care for results below 2^-126, which costs three instructions of four."""
    if INTERPRET:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def store_rows(
    acc,  # [features, ROWS] or its transpose
    row_max,  # [ROWS] as `acc` is to be broadcast with
    row_sum,
    out_ptr,
    part_out_ptr,
    part_stat_ptr,
    head_rows,  # seq * Hq + query head
    features,
    mask,
    row_mask,
    split,
    splits,
    D: tl.constexpr,
):
    """The finished rows where there is one split, else this split's unnormalised rows."""
    if part_out_ptr is None:
        out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)  # no keys: 0
        tl.store(out_ptr + head_rows * D + features, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        parts = head_rows * splits + split
        tl.store(part_out_ptr + parts * D + features, acc, mask=mask)
        tl.store(part_stat_ptr + parts * 2, row_max, mask=row_mask)
        tl.store(part_stat_ptr + parts * 2 + 1, row_sum, mask=row_mask)


@triton.jit(do_not_specialize=["context_lens_ptr", "window", "num_splits"])
def merge_splits_kernel(
    part_out_ptr,
    part_stat_ptr,
    context_lens_ptr,
    out_ptr,  # [S * Hq, D]
    window,
    num_splits,
    QUERY_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two >= D
    TOKENS: tl.constexpr,
    WIDTH_SPLITS: tl.constexpr,  # the power of two >= num_splits
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, WIDTH_SPLITS)
    offs_d = tl.arange(0, WIDTH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    context_len = tl.load(context_lens_ptr + row // QUERY_HEADS)
    _, first, last = split_bounds(context_len, window, splits, num_splits, TOKENS)
    written = first < last  # none at or after num_splits
    stats = part_stat_ptr + (row * num_splits + splits) * 2
    row_max = tl.load(stats, mask=written, other=HIDDEN)
    row_sum = tl.load(stats + 1, mask=written, other=0.0)
    weight = tl.exp2(row_max - tl.max(row_max, 0))
    parts = (row * num_splits + splits)[:, None] * D + offs_d[None, :]
    mask = written[:, None] & (offs_d < D)[None, :]
    out = tl.sum(tl.load(part_out_ptr + parts, mask=mask, other=0.0) * weight[:, None], 0)
    total = tl.sum(row_sum * weight, 0)
    out = out / tl.where(total == 0.0, 1.0, total)  # no keys: 0
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
