"""Device functions of both decode attention kernels, and the kernel that merges their splits.

Partial results: part_out float32 [S, Hq, splits, D], a split's sum of p * v, and part_stat float32
[S, Hq, splits, 2], the row maximum m (of exponents of 2) that its p are relative to, and the sum of
p. The merged row is sum(2^(m - max m) * part_out) / sum(2^(m - max m) * part_sum), in the order of
the splits.
"""

import triton
import triton.language as tl

from kernels.gpu.flags import LOG2_E

# Scores of hidden keys: finite, so that no difference of two is NaN.
HIDDEN = tl.constexpr(-1e30)


@triton.jit
def split_bounds(context_len, window, split, splits, TOKENS: tl.constexpr):
    """-> (first key any split sees, this split's keys start:end; start >= end: none).

    Splits are whole tiles, so that the first tile and the last one of a sequence alone are ragged.
    """
    first_key = 0 if window is None else tl.maximum(context_len - window, 0)
    first_tile = first_key // TOKENS
    per_split = tl.cdiv(tl.cdiv(context_len, TOKENS) - first_tile, splits)
    start = (first_tile + split * per_split) * TOKENS
    return first_key, start, tl.minimum(start + per_split * TOKENS, context_len)


@triton.jit
def exponents(scores, scale, soft_cap, slopes, distance):
    """q . k -> the exponent of 2 in softmax. `scale` holds log2(e); slopes * distance: ALiBi."""
    if soft_cap is None:
        scores = scores * scale
    else:  # cap * tanh(x / cap), and tanh(y) = 1 - 2 / (1 + e^2y), which cannot overflow
        grown = tl.exp2(scores * (2.0 * scale / soft_cap))
        scores = (soft_cap * LOG2_E) * (1.0 - 2.0 / (1.0 + grown))
    if slopes is not None:
        scores = scores + slopes * LOG2_E * distance
    return scores


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


@triton.jit(do_not_specialize=["window"])
def merge_splits_kernel(
    part_out_ptr,
    part_stat_ptr,
    context_lens_ptr,
    out_ptr,  # [S * Hq, D]
    window,
    QUERY_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two >= D
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    offs_d = tl.arange(0, WIDTH)
    context_len = tl.load(context_lens_ptr + row // QUERY_HEADS)
    _, start, end = split_bounds(context_len, window, splits, SPLITS, TOKENS)
    written = start < end
    stats = part_stat_ptr + (row * SPLITS + splits) * 2
    row_max = tl.load(stats, mask=written, other=HIDDEN)
    row_sum = tl.load(stats + 1, mask=written, other=0.0)
    weight = tl.exp2(row_max - tl.max(row_max, 0))
    parts = (row * SPLITS + splits)[:, None] * D + offs_d[None, :]
    mask = written[:, None] & (offs_d < D)[None, :]
    out = tl.sum(tl.load(part_out_ptr + parts, mask=mask, other=0.0) * weight[:, None], 0)
    total = tl.sum(row_sum * weight, 0)
    out = out / tl.where(total == 0.0, 1.0, total)  # no keys: 0
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
