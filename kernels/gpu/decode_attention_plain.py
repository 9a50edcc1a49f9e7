"""Decode attention of one split over plain keys and values, [blocks, 2 * Hkv, block_size, D].

Scores are S = Q @ K^T and the output O = P @ V, with the query heads of a KV head as rows. p is
rounded to the values' type for the second product, and summed as float32.
"""

import triton
import triton.language as tl

from kernels.gpu.decode_attention_parts import (
    HIDDEN,
    cap_scores,
    exp2,
    split_bounds,
    store_rows,
)
from kernels.gpu.flags import LOG2_E


@triton.jit(
    do_not_specialize=["block_tables_ptr", "rows_ptr", "context_lens_ptr", "window", "table_stride"]
)
def decode_plain_kernel(
    q_ptr,  # [S, HEADS * G, D] by strides
    cache_ptr,  # [blocks, 2 * HEADS, BLOCK_SIZE, D]
    block_tables_ptr,  # [:, table_stride]
    rows_ptr,  # [S]
    context_lens_ptr,  # [S]
    alibi_ptr,  # float32 [HEADS * G] or None
    out_ptr,  # [S, HEADS * G, D]
    part_out_ptr,  # None with one split
    part_stat_ptr,
    scale,  # softmax scale * log2(e)
    soft_cap,  # or None
    window,  # or None
    stride_qs,
    stride_qh,
    table_stride,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two >= D
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,  # float32 products
    PDL: tl.constexpr,
):
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // TOKENS
    ROW_TILES: tl.constexpr = (G + ROWS - 1) // ROWS
    seq = tl.program_id(0)
    head = tl.program_id(1) // ROW_TILES
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    context_len = tl.load(context_lens_ptr + seq)
    first_key, first, last = split_bounds(context_len, window, split, splits, TOKENS)
    if part_out_ptr is not None:  # noqa: SIM102 - known when compiled, the next is not
        if first >= last:
            return
    rows = tl.program_id(1) % ROW_TILES * ROWS + tl.arange(0, ROWS)
    heads = head * G + rows
    offs_d = tl.arange(0, WIDTH)
    mask = (rows < G)[:, None] & (offs_d < D)[None, :]
    q_rows = seq.to(tl.int64) * stride_qs + heads * stride_qh
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    if EXACT:
        q = q.to(tl.float32)
    slopes = None
    if alibi_ptr is not None:
        slopes = tl.load(alibi_ptr + heads, mask=rows < G, other=0.0)[:, None] * LOG2_E

    offs_t = tl.arange(0, TOKENS)
    offs_kv = offs_t[:, None] * D + offs_d[None, :]
    table = block_tables_ptr + tl.load(rows_ptr + seq).to(tl.int64) * table_stride
    row_max = tl.full((ROWS,), HIDDEN, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    block = tl.load(table + first // PER_BLOCK, mask=first < last, other=0).to(tl.int64)
    for tile in tl.range(first, last):
        # A tile early: the copies into shared memory, which run ahead, need not wait for it.
        next_block = tl.load(table + (tile + 1) // PER_BLOCK, mask=tile + 1 < last, other=0)
        token = tile * TOKENS
        slot = (block * (2 * HEADS) + head) * BLOCK_SIZE + tile % PER_BLOCK * TOKENS
        positions = token + offs_t
        seen = positions < context_len
        # Slots behind the context may hold NaN: 0 * NaN would pass a mask of the scores alone.
        v_mask = seen[:, None]
        if D == WIDTH:
            k = tl.load(cache_ptr + slot * D + offs_kv)
        else:
            k = tl.load(cache_ptr + slot * D + offs_kv, mask=offs_d[None, :] < D, other=0.0)
            v_mask = v_mask & (offs_d < D)[None, :]
        v_ptr = cache_ptr + (slot + HEADS * BLOCK_SIZE) * D
        v = tl.load(v_ptr + offs_kv, mask=v_mask, other=0.0)
        if EXACT:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if soft_cap is not None:
            scores = cap_scores(scores, soft_cap)
        if slopes is not None:
            scores += slopes * (positions - (context_len - 1)).to(tl.float32)[None, :]
        if window is not None:
            seen = seen & (positions >= first_key)
        scores = tl.where(seen[None, :], scores, HIDDEN)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = exp2(scores - new_max[:, None])
        decay = exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, 1)
        row_max = new_max
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        block = next_block.to(tl.int64)
    store_rows(
        acc, row_max[:, None], row_sum[:, None], out_ptr, part_out_ptr, part_stat_ptr,
        (seq.to(tl.int64) * (HEADS * G) + heads)[:, None], offs_d[None, :], mask,
        (rows < G)[:, None], split, splits, D,
    )  # fmt: skip
