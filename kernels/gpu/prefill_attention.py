"""Causal attention of prompt chunks over the paged cache.

Layout: q and out [T, Hq, D]; caches and the words of quantised ones as in kernels/kv_layout.py.

Math: out = softmax(scale * q k^T + mask) v. Query i of a sequence's chunk of n sits at position
context_len - n + i and sees the keys up to itself, within the window. Scores are in base 2
(scale * log2 e), so that a multiply-add and an exp2 make a weight; -1e30 stands for -inf.

A program takes BLOCK_M rows, the G query heads of one key head for BLOCK_M // G queries of one
sequence, and walks that sequence's keys in tiles of BLOCK_N, each within one block of the cache.
Only tiles on the diagonal and at the window's edge are masked, in loops of their own; what no query
of the program sees is not read. The last queries of a chunk see the most keys and start first.

The step's own keys and values were stored before this runs and are read from the cache, as every
later step will read them, quantised ones too. Key tiles begin at multiples of BLOCK_N and a tile
that a row does not see changes nothing in it: however a prompt is cut into chunks, each of its
queries has the same sums in the same order. So no schedule shows in the tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import tiles
from kernels.gpu.compile import CompileCase
from kernels.gpu.flags import INTERPRET, LOG2_E
from kernels.gpu.prefill_attention_loads import load_plain_tile, load_quantized_tile
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICIES, LayerCache, QuantizedKV, features_per_token


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
    q, acc, row_max, row_sum, positions, slopes, start, end,
    k_ptr, v_ptr, params_ptr, table_ptr, head, scale, window, soft_cap,
    HKV: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, POLICY: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The rows' maxima, sums and weighted values after the keys from `start` up to `end`."""
    BLOCK_F: tl.constexpr = BLOCK_D // 2 if POLICY == 4 else BLOCK_D
    offs_n = tl.arange(0, BLOCK_N)
    for key in tl.range(start, end, BLOCK_N):
        if POLICY == 0:
            k, v = load_plain_tile(
                k_ptr, v_ptr, table_ptr, head, key, end,
                HKV, D, BLOCK_SIZE, BLOCK_D, BLOCK_N, MASKED,
            )  # fmt: skip
        else:
            k, v = load_quantized_tile(
                k_ptr, v_ptr, params_ptr, table_ptr, head, key, end,
                HKV, F, BLOCK_SIZE, BLOCK_F, BLOCK_N, POLICY, EXACT, MASKED,
            )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        factor = scale * LOG2_E
        if soft_cap is not None:  # tanh(x) = 1 - 2 / (1 + e^2x)
            cap = soft_cap * LOG2_E
            scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores * (2.0 * factor / soft_cap)))
        if slopes is not None:
            if soft_cap is None:
                scores *= factor
            distance = (key + offs_n)[None, :] - positions[:, None]
            scores += (slopes * LOG2_E)[:, None] * distance.to(tl.float32)
        if soft_cap is not None or slopes is not None:
            factor = 1.0
        seen = scores
        if MASKED:
            mask = (key + offs_n)[None, :] <= positions[:, None]
            if window is not None:
                mask &= (key + offs_n)[None, :] > positions[:, None] - window
            seen = tl.where(mask, scores, -1e30)
        new_max = tl.maximum(row_max, tl.max(seen, 1) * factor)
        p = tl.exp2(scores * factor - new_max[:, None])
        if MASKED:  # a hidden score may be NaN, or its weight infinite
            p = tl.where(mask, p, 0.0)
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, 1)
        row_max = new_max
        p = p.to(v.dtype)
        if POLICY == 0:
            acc = tl.dot(p, v, acc * decay[:, None], input_precision="ieee")
        else:
            acc = tl.dot(v, tl.trans(p), acc * decay[None, :], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["window", "first_row", "num_rows", "table_stride"])
def _prefill_kernel(
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
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if POLICY == 0:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    else:
        acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    if window is not None:
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, positions, slopes, start, edge,
            k_ptr, v_ptr, params_ptr, table_ptr, head, scale, window, soft_cap,
            HKV, D, F, BLOCK_SIZE, BLOCK_D, BLOCK_N, POLICY, EXACT, True,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        q, acc, row_max, row_sum, positions, slopes, edge, diagonal,
        k_ptr, v_ptr, params_ptr, table_ptr, head, scale, window, soft_cap,
        HKV, D, F, BLOCK_SIZE, BLOCK_D, BLOCK_N, POLICY, EXACT, False,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        q, acc, row_max, row_sum, positions, slopes, diagonal, end,
        k_ptr, v_ptr, params_ptr, table_ptr, head, scale, window, soft_cap,
        HKV, D, F, BLOCK_SIZE, BLOCK_D, BLOCK_N, POLICY, EXACT, True,
    )  # fmt: skip
    if POLICY != 0:
        acc = tl.trans(acc)
    out = acc * (1.0 / row_sum)[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def prefill_attention(
    q: Tensor,
    cache: LayerCache,
    step: GpuStep,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Fills out [T, Hq, D] for the step's rows from num_decodes on. scale > 0."""
    num_tokens, num_heads, head_dim = q.shape
    if isinstance(cache, QuantizedKV):
        assert cache.head_dim == head_dim
        policy, num_kv_heads, block_size = cache.policy, cache.num_kv_heads, cache.block_size
        k, v, params = cache.k, cache.v, cache.params
        assert k.is_contiguous()
        assert v.is_contiguous()
        assert params is not None
        assert params.is_contiguous()
    else:
        assert cache.dtype == q.dtype
        assert cache.shape[3] == head_dim
        assert cache.is_contiguous()
        policy, num_kv_heads, block_size = 0, cache.shape[1] // 2, cache.shape[2]
        k, v, params = cache, cache[:, num_kv_heads:], None
    assert num_heads % num_kv_heads == 0
    assert block_size == step.block_size
    assert num_tokens == step.num_tokens
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert q.is_contiguous()
    assert out.is_contiguous()
    assert step.block_tables.stride(1) == 1
    assert scale > 0  # the largest score is found before it is scaled
    if alibi_slopes is not None:
        assert alibi_slopes.shape == (num_heads,)
        assert alibi_slopes.dtype == torch.float32
    num_rows = step.num_seqs - step.num_decodes
    if num_rows == 0:
        return
    group = num_heads // num_kv_heads
    tile = _tile(q, policy, group, block_size)
    num_queries = num_tokens - step.num_decodes  # a decode row has one
    grid = (num_kv_heads, num_queries // (tile["block_m"] // group) + num_rows)
    constants, options = _form(q.dtype, policy, num_kv_heads, group, head_dim, block_size, tile)
    _prefill_kernel[grid](
        q, k, v, params, alibi_slopes, step.query_start_loc, step.context_lens, step.rows,
        step.block_tables, out, scale, window, soft_cap, step.num_decodes, num_rows,
        step.block_tables.stride(0), **constants, **options,
    )  # fmt: skip


def _tile(q: Tensor, policy: int, group: int, block_size: int) -> tiles.Tile:
    kv = ("plain", "int4", "int8", "fp8")[POLICIES.index(policy)]
    if q.dtype == torch.float32:
        kv += ", exact"
    head_dim = q.shape[2]
    tuned = tiles.lookup(
        "prefill_attention", head_dim=head_dim, group=group, kv=kv, block_size=block_size
    )
    hopper = not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (9, 0)
    return tuned or _default_tile(head_dim, q.dtype == torch.float32, hopper)


def _default_tile(head_dim: int, exact: bool, hopper: bool) -> tiles.Tile:
    """What the registers of one CTA hold without spilling (benchmarks will know better).

    128 rows halve the reads of keys and values from L2 that 64 would make, which would take more
    than its bandwidth at the matrix units' full rate. Exact products are made by multiply-adds,
    whose operands all pass through registers.
    """
    if exact:
        sizes = (32, 16, 8, 2) if head_dim <= 128 else (16, 16, 4, 1)
    elif head_dim <= 128:
        sizes = (128, 64, 8, 3) if hopper else (128, 32, 8, 3)
    else:
        sizes = (128, 32, 8, 2) if hopper else (64, 32, 8, 2)
    return dict(zip(("block_m", "block_n", "num_warps", "num_stages"), sizes, strict=True))


def _form(
    dtype: torch.dtype,
    policy: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    tile: tiles.Tile,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's constants and launch options."""
    features = features_per_token(head_dim, policy)
    constants = {
        "HKV": num_kv_heads,
        "G": group,
        "D": head_dim,
        "F": features,
        "BLOCK_SIZE": block_size,
        "BLOCK_D": triton.next_power_of_2(features) * (2 if policy == 4 else 1),
        "BLOCK_M": tile["block_m"],
        "BLOCK_N": min(tile["block_n"], block_size),
        "POLICY": policy,
        "EXACT": dtype == torch.float32 or INTERPRET.value,
    }
    return constants, {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}


def compile_cases() -> list[CompileCase]:
    """Each type and size on both generations, and what a model may add to the scores."""
    bf16, fp32 = torch.bfloat16, torch.float32
    forms = [
        (bf16, 0, 128),
        (bf16, 0, 80),
        (bf16, 0, 256),
        (bf16, 8, 128),
        (bf16, 4, 128),
        (fp32, 0, 128),
    ]
    return [
        *(_case(*form, hopper=hopper) for hopper in (False, True) for form in forms),
        _case(bf16, 16, 128, hopper=True),
        _case(bf16, 0, 128, hopper=True, window=True),
        _case(bf16, 0, 128, hopper=True, soft_cap=True),
        _case(bf16, 0, 128, hopper=True, slopes=True),
    ]


def _case(
    dtype: torch.dtype,
    policy: int,
    head_dim: int,
    *,
    hopper: bool,
    group: int = 4,
    block_size: int = 64,
    tile: tiles.Tile | None = None,
    window: bool = False,
    soft_cap: bool = False,
    slopes: bool = False,
) -> CompileCase:
    tile = tile or _default_tile(head_dim, dtype == torch.float32, hopper)
    constants, options = _form(dtype, policy, 8, group, head_dim, block_size, tile)
    stored = torch.int32 if policy else dtype
    added = {"window": window, "soft cap": soft_cap, "alibi": slopes}
    words = [str(dtype)[6:], f"kv {policy}", f"D {head_dim}", *(k for k, v in added.items() if v)]
    return CompileCase(
        label=f"prefill_attention {', '.join(words)}, {'sm_90' if hopper else 'sm_80'} tile",
        kernel=_prefill_kernel,
        arguments=(
            dtype, stored, stored, torch.int32 if policy else None,
            torch.float32 if slopes else None, *[torch.int32] * 4, dtype,
            0.1, 1000 if window else None, 30.0 if soft_cap else None, 1, 1, 1,
        ),
        constants=constants,
        options=options,
        elements=constants["BLOCK_M"] * constants["BLOCK_N"],
        min_capability=90 if hopper or policy == 16 else 80,
    )  # fmt: skip
