"""Decode attention of one split over quantised keys and values (QuantizedKV, kv_unpack.py).

Scores are S^T = K @ Q^T and the output O^T = V^T @ P^T: keys and values are the left operands,
which the matrix unit takes from the registers that they were unpacked in.

Everything that float16 holds is brought to its range. q is divided by the power of two of its
largest element, which is exact. The v scale goes into the exponent: p~ = 2^(s + log2(v_scale) - m)
with m the row's running maximum of s + log2(v_scale), less 15: the largest product is 2^15 and one
2^39 times smaller is the first to vanish. Sums of p = p~ / v_scale and of p * v_zero stay in
float32 per token lane until the end, so that the loop reduces nothing but the maximum.

Slots behind the context may hold anything, NaN in `params` too, but for bytes that are NaN as fp8:
the quantiser (kv_quantize.py) writes none, and caches begin as zeros.
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
from kernels.gpu.flags import INTERPRET, LOG2_E
from kernels.gpu.kv_unpack import centred_params, feature_order, unpack_k, unpack_vt

_SCALE_ONE = tl.constexpr(0x3C00)  # the word of scale 1 and zero 0
_HEADROOM = tl.constexpr(15.0)


@triton.jit
def _log2(x, EXACT: tl.constexpr):
    if INTERPRET or EXACT:
        y = tl.log2(x)
    else:  # 16 instructions fewer; the error of 2^-22 is nothing beside float16's
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit(
    do_not_specialize=["block_tables_ptr", "rows_ptr", "context_lens_ptr", "window", "table_stride"]
)
def decode_quantized_kernel(
    q_ptr,  # [S, HEADS * G, D] by strides
    k_ptr,  # words [blocks, HEADS, BLOCK_SIZE, F / 4]
    v_ptr,  # words [blocks, HEADS, BLOCK_SIZE / 4, F]
    params_ptr,  # words [blocks, 2 * HEADS, BLOCK_SIZE]
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
    F: tl.constexpr,
    F_WIDTH: tl.constexpr,  # the power of two >= F
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    POLICY: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    FLOAT: tl.constexpr = tl.float32 if EXACT else tl.float16
    WIDTH: tl.constexpr = 2 * F_WIDTH if POLICY == 4 else F_WIDTH
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
    features = feature_order(WIDTH, F, POLICY)
    mask = (features < D)[:, None] & (rows < G)[None, :]
    q_rows = seq.to(tl.int64) * stride_qs + heads * stride_qh
    q = tl.load(q_ptr + q_rows[None, :] + features[:, None], mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(q)), 1e-30)
    q_unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    qt = (q / q_unit).to(FLOAT)
    unit = q_unit * scale
    unit_sum = (tl.sum(qt.to(tl.float32), 0) * unit)[None, :]
    slopes = None
    if alibi_ptr is not None:
        slopes = tl.load(alibi_ptr + heads, mask=rows < G, other=0.0)[None, :] * LOG2_E

    offs_t = tl.arange(0, TOKENS)
    offs_w = tl.arange(0, F_WIDTH // 4)
    offs_f = tl.arange(0, F_WIDTH)
    offs_k = offs_t[:, None] * (F // 4) + offs_w[None, :]
    offs_v = tl.arange(0, TOKENS // 4)[:, None] * F + offs_f[None, :]
    table = block_tables_ptr + tl.load(rows_ptr + seq).to(tl.int64) * table_stride
    row_max = tl.full((ROWS,), HIDDEN, tl.float32)
    p_sum = tl.zeros((TOKENS, ROWS), tl.float32)
    z_sum = tl.zeros((TOKENS, ROWS), tl.float32)
    acc = tl.zeros((WIDTH, ROWS), tl.float32)
    block = tl.load(table + first // PER_BLOCK, mask=first < last, other=0).to(tl.int64)
    for tile in tl.range(first, last):
        # A tile early: the copies into shared memory, which run ahead, need not wait for it.
        next_block = tl.load(table + (tile + 1) // PER_BLOCK, mask=tile + 1 < last, other=0)
        k_slot = (block * HEADS + head) * BLOCK_SIZE + tile % PER_BLOCK * TOKENS
        k_param = k_slot + block * (HEADS * BLOCK_SIZE)
        positions = tile * TOKENS + offs_t
        seen = positions < context_len
        if F == F_WIDTH:
            k_words = tl.load(k_ptr + k_slot * (F // 4) + offs_k)
            v_words = tl.load(v_ptr + k_slot * (F // 4) + offs_v)
        else:
            k_words = tl.load(
                k_ptr + k_slot * (F // 4) + offs_k, mask=offs_w[None, :] < F // 4, other=0
            )
            v_words = tl.load(v_ptr + k_slot * (F // 4) + offs_v, mask=offs_f[None, :] < F, other=0)
        # Scale and zero in one word: four bytes are the least an asynchronous copy takes.
        k_params = tl.load(params_ptr + k_param + offs_t, mask=seen, other=0)
        v_param = k_param + HEADS * BLOCK_SIZE
        v_params = tl.load(params_ptr + v_param + offs_t, mask=seen, other=_SCALE_ONE)
        k_scale, k_zero = centred_params(k_params, POLICY)
        v_scale, v_zero = centred_params(v_params, POLICY)
        if window is not None:
            seen = seen & (positions >= first_key)
        v_exponent = _log2(v_scale, EXACT)
        shift = tl.where(seen, v_exponent, HIDDEN)[:, None]
        scores = tl.dot(unpack_k(k_words, POLICY, EXACT), qt, input_precision="ieee")
        scores *= (k_scale * unit)[:, None]
        constant = shift if soft_cap is None else 0.0
        if POLICY != 16:
            constant = k_zero[:, None] * unit_sum + constant
        scores += constant
        if soft_cap is not None:
            scores = cap_scores(scores, soft_cap) + shift
        if slopes is not None:
            scores += slopes * (positions - (context_len - 1)).to(tl.float32)[:, None]
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        decay = exp2(row_max - new_max)[None, :]
        p = exp2(scores - (new_max - _HEADROOM)[None, :])
        v_inverse = exp2(-v_exponent)
        p_sum = p_sum * decay + p * v_inverse[:, None]
        if POLICY != 16:
            z_sum = z_sum * decay + p * (v_zero * v_inverse)[:, None]
        row_max = new_max
        vt = unpack_vt(v_words, POLICY, EXACT)
        acc = tl.dot(vt, p.to(FLOAT), acc * decay, input_precision="ieee")
        block = next_block.to(tl.int64)
    if POLICY != 16:
        acc += tl.sum(z_sum, 0)[None, :]
    store_rows(
        acc, row_max[None, :], tl.sum(p_sum, 0)[None, :], out_ptr, part_out_ptr, part_stat_ptr,
        (seq.to(tl.int64) * (HEADS * G) + heads)[None, :], features[:, None], mask,
        (rows < G)[None, :], split, splits, D,
    )  # fmt: skip
