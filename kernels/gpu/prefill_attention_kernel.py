"""The kernel of prefill_attention.py: BLOCK_M rows of one key head against their sequence's keys.

Rows are the G query heads of the key head for BLOCK_M // G queries of one sequence. Keys come tile
by tile, with a running maximum. Over a plain cache out accumulates as P V [BLOCK_M, BLOCK_D], over
a quantised one as V^T P^T [BLOCK_D, BLOCK_M] (prefill_attention_loads.py).
"""

import triton
import triton.language as tl

from kernels.gpu.flags import LOG2_E
from kernels.gpu.prefill_attention_loads import load_plain_tile, load_quantized_tile

# Scores of hidden keys, and the maximum of a row that has seen none: so much larger that, until one
# is seen, hidden keys' weights are exp2 of a large negative number as well. Both finite: no
# difference of two is NaN.
HIDDEN = tl.constexpr(-1e30)
_NO_MAX = tl.constexpr(-1e20)


@triton.jit
def _find_tile(query_start_loc_ptr, first_row, num_rows, tile, BLOCK_Q: tl.constexpr):
    """The row of the tile, and the tile's number among that row's.

    Rows begin at tile (their first query) // BLOCK_Q + (their number): enough tiles for each, known
    from the prefix sums alone.
    """
    origin = tl.load(query_start_loc_ptr + first_row)
    before = -1
    for start in tl.range(0, num_rows, 64):
        rows = start + tl.arange(0, 64)
        queries = tl.load(query_start_loc_ptr + first_row + rows, mask=rows < num_rows, other=0)
        first_tiles = (queries - origin) // BLOCK_Q + rows
        before += tl.sum(((first_tiles <= tile) & (rows < num_rows)).to(tl.int32))
    row = first_row + before
    first_tile = (tl.load(query_start_loc_ptr + row) - origin) // BLOCK_Q + before
    return row, tile - first_tile


@triton.jit
def _attend(
    q, acc, p, decay, row_max, row_sum, positions, slopes, origin, start, end,
    k_ptr, v_ptr, params_ptr, table_ptr, head, scale, window, soft_cap,
    HKV: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, POLICY: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """What the rows have after the keys from `start` up to `end`.

    Over a plain cache a tile's weights p and the decay of what was before it wait for the next
    tile: its scores are asked for first, and while those of this step become weights, the matrix
    unit multiplies the weights of the step before with their values.
    """
    BLOCK_F: tl.constexpr = BLOCK_D // 2 if POLICY == 4 else BLOCK_D
    # Around a loop of no steps ptxas 12.8 would make all matrix instructions wait for each other.
    if start < end:
        for key in tl.range(start, end, BLOCK_N):
            if POLICY == 0:
                k = load_plain_tile(
                    k_ptr, table_ptr, head, key, end, HKV, D, BLOCK_SIZE, BLOCK_D, BLOCK_N, False
                )
            else:
                k, v = load_quantized_tile(
                    k_ptr, v_ptr, params_ptr, table_ptr, head, key, end,
                    HKV, F, BLOCK_SIZE, BLOCK_F, BLOCK_N, POLICY, EXACT, MASKED,
                )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if POLICY == 0:
                before = tl.maximum(key - BLOCK_N, origin)
                v = load_plain_tile(
                    v_ptr, table_ptr, head, before, end,
                    HKV, D, BLOCK_SIZE, BLOCK_D, BLOCK_N, MASKED,
                )  # fmt: skip
                acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            p, decay, row_max, row_sum = _weights(
                scores, row_max, row_sum, positions, slopes, key, scale, window, soft_cap,
                BLOCK_N, MASKED,
            )  # fmt: skip
            if POLICY != 0:
                pt = tl.trans(p.to(v.dtype))
                acc = tl.dot(v, pt, acc * decay[None, :], input_precision="ieee")
    return acc, p, decay, row_max, row_sum


@triton.jit
def _weights(
    scores, row_max, row_sum, positions, slopes, key, scale, window, soft_cap,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a tile of keys, relative to the rows' maxima so far, and the decay of earlier ones."""
    positions_n = key + tl.arange(0, BLOCK_N)
    factor = scale * LOG2_E
    if soft_cap is not None:  # tanh(x) = 1 - 2 / (1 + e^2x)
        cap = soft_cap * LOG2_E
        scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores * (2.0 * factor / soft_cap)))
    if slopes is not None:
        if soft_cap is None:
            scores *= factor
        distance = positions_n[None, :] - positions[:, None]
        scores += (slopes * LOG2_E)[:, None] * distance.to(tl.float32)
    if soft_cap is not None or slopes is not None:
        factor = 1.0
    if MASKED:
        mask = positions_n[None, :] <= positions[:, None]
        if window is not None:
            mask &= positions_n[None, :] > positions[:, None] - window
        scores = tl.where(mask, scores, HIDDEN)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    p = tl.exp2(scores * factor - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    return p, decay, new_max, row_sum * decay + tl.sum(p, 1)


@triton.jit(do_not_specialize=["window", "first_row", "num_rows", "table_stride"])
def prefill_kernel(
    q_ptr,  # [T, HKV * G, D]
    k_ptr,
    v_ptr,
    params_ptr,  # None: keys and values are plain
    slopes_ptr,  # float32 [HKV * G], or None
    query_start_loc_ptr,
    context_lens_ptr,
    rows_ptr,
    block_tables_ptr,
    out_ptr,
    scale,
    window,  # None: all keys
    soft_cap,
    first_row,
    num_rows,
    table_stride,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,  # bytes of a token's keys; plain: D
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns of an unpacked tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POLICY: tl.constexpr,
    EXACT: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    head = tl.program_id(0)
    row, tile = _find_tile(query_start_loc_ptr, first_row, num_rows, tl.program_id(1), BLOCK_Q)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    context_len = tl.load(context_lens_ptr + row)
    tile = tl.cdiv(query_len, BLOCK_Q) - 1 - tile
    if (tile < 0) | (context_len == 0):
        return

    offs_m = tl.arange(0, BLOCK_M)
    queries = tile * BLOCK_Q + offs_m // G
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    if POLICY == 4:  # feature_order of kv_unpack.py, from which the compiler sees runs of 8
        offs_f = offs_d // 16 * 8 + offs_d % 8
        offs_d = offs_f + offs_d // 8 % 2 * F
        mask_d = (offs_f < F) & (offs_d < D)
    mask = ((queries < query_len) & (offs_m < BLOCK_Q * G))[:, None] & mask_d[None, :]
    q_rows = ((first_token + queries).to(tl.int64) * HKV + head) * G + offs_m % G
    offsets = q_rows[:, None] * D + offs_d[None, :]
    q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
    if EXACT:
        q = q.to(tl.float32)
    elif POLICY != 0:
        q = q.to(tl.float16)
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + head * G + offs_m % G)

    # Keys [start, edge) and [diagonal, end) are masked; all queries see those in between.
    first = context_len - query_len + tile * BLOCK_Q  # position of the first query
    end = tl.minimum(first + BLOCK_Q, context_len)
    diagonal = (first + 1) // BLOCK_N * BLOCK_N
    start = 0
    edge = 0
    if window is not None:
        start = tl.maximum(first + 1 - window, 0) // BLOCK_N * BLOCK_N
        edge = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N, diagonal)

    positions = context_len - query_len + queries
    table_ptr = block_tables_ptr + tl.load(rows_ptr + row).to(tl.int64) * table_stride
    row_max = tl.full((BLOCK_M,), _NO_MAX, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    decay = tl.zeros((BLOCK_M,), tl.float32)
    if POLICY == 0:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    else:
        acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    if window is not None:
        acc, p, decay, row_max, row_sum = _attend(
            q, acc, p, decay, row_max, row_sum, positions, slopes, start, start, edge,
            k_ptr, v_ptr, params_ptr, table_ptr, head, scale, window, soft_cap,
            HKV, D, F, BLOCK_SIZE, BLOCK_D, BLOCK_N, POLICY, EXACT, True,
        )  # fmt: skip
    acc, p, decay, row_max, row_sum = _attend(
        q, acc, p, decay, row_max, row_sum, positions, slopes, start, edge, diagonal,
        k_ptr, v_ptr, params_ptr, table_ptr, head, scale, window, soft_cap,
        HKV, D, F, BLOCK_SIZE, BLOCK_D, BLOCK_N, POLICY, EXACT, False,
    )  # fmt: skip
    acc, p, decay, row_max, row_sum = _attend(
        q, acc, p, decay, row_max, row_sum, positions, slopes, start, diagonal, end,
        k_ptr, v_ptr, params_ptr, table_ptr, head, scale, window, soft_cap,
        HKV, D, F, BLOCK_SIZE, BLOCK_D, BLOCK_N, POLICY, EXACT, True,
    )  # fmt: skip
    if POLICY == 0:
        v = load_plain_tile(
            v_ptr, table_ptr, head, (end - 1) // BLOCK_N * BLOCK_N, end,
            HKV, D, BLOCK_SIZE, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    else:
        acc = tl.trans(acc)
    out = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]  # 0: a row past the end
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
