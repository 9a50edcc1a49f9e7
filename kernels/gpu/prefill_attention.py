"""Causal attention of prompt chunks over the paged cache.

Layout: q and out [T, Hq, D]; caches and the words of quantised ones as in kernels/kv_layout.py.

Math: out = softmax(scale * q k^T + mask) v. Query i of a sequence's chunk of n sits at position
context_len - n + i and sees the keys up to itself, within the window. Scores are in base 2
(scale * log2 e), so that a multiply-add and an exp2 make a weight; -1e30 stands for -inf.

A program takes the G query heads of one key head for some queries of one sequence and walks that
sequence's keys in tiles, each within one block of the cache. Only tiles on the diagonal and at the
window's edge are masked, in loops of their own; what no query of the program sees is not read. The
last queries of a chunk see the most keys and start first.

The step's own keys and values were stored before this runs and are read from the cache, as every
later step will read them, quantised ones too. Tiles begin at multiples of their size, and one that
a row does not see changes nothing in it: however a prompt is cut into chunks, each query's sums
have the same terms in the same order. So no schedule shows in the tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gpu import interpreted, tiles
from kernels.gpu.chip import chip_of
from kernels.gpu.compile import CompileCase
from kernels.gpu.prefill_attention_kernel import prefill_kernel
from kernels.gpu.step import GpuStep
from kernels.kv_layout import (
    POLICY_NAMES,
    LayerCache,
    QuantizedKV,
    features_per_token,
    policy_of,
)


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
        assert all(x.is_contiguous() for x in (k, v, cache.params))
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
    tile = _tile(q, policy, group, block_size, window)
    if policy and head_dim > 128:  # as a register operand, converted here, it would spill
        q = q if q.dtype == torch.float32 else q.half()
    num_queries = num_tokens - step.num_decodes  # a decode row has one
    constants, options = _form(q.dtype, policy, num_kv_heads, group, head_dim, block_size, tile)
    grid = (num_kv_heads, num_queries // (constants["BLOCK_M"] // group) + num_rows)
    prefill_kernel[grid](
        q, k, v, params, alibi_slopes, step.query_start_loc, step.context_lens, step.rows,
        step.block_tables, out, scale, window, soft_cap, step.num_decodes, num_rows,
        step.block_tables.stride(0), **constants, **options,
    )  # fmt: skip


def _tile(q: Tensor, policy: int, group: int, block_size: int, window: int | None) -> tiles.Tile:
    head_dim, exact = q.shape[2], q.dtype == torch.float32
    if not exact:  # which is for tests
        kv = POLICY_NAMES[policy]
        tuned = tiles.lookup(
            "prefill_attention", head_dim=head_dim, group=group, kv=kv, block_size=block_size
        )
        if tuned is not None:
            return tuned
    hopper = chip_of(q.device).has_wide_products
    return default_tile(head_dim, policy, exact=exact, hopper=hopper, window=window is not None)


def default_tile(
    head_dim: int, policy: int, *, exact: bool, hopper: bool, window: bool = False
) -> tiles.Tile:
    """What compiles without spilling, as large as that.

    128 rows need half the reads of keys and values from L2 that 64 would, which at the matrix
    units' full rate were beyond it. The block's number is a load before the loads of a tile: with
    five stages a tile has a whole step to arrive, with three only the time in which a plain cache's
    weights are made. A window takes registers, for a loop more. Exact products are multiply-adds,
    whose operands all pass through registers.
    """
    wide = head_dim > 128
    if exact:
        sizes = (16, 16, 4, 1) if wide or policy else (32, 16, 8, 2)
    elif hopper and wide and window:
        sizes = (32, 32, 8, 3) if policy else (64, 32, 8, 3)
    elif hopper:
        sizes = ((64, 16, 8, 3) if policy else (128, 32, 8, 3)) if wide else (128, 64, 8, 5)
    elif policy:
        sizes = (64, 16, 8, 5) if wide else (64, 32, 4, 5)
    elif wide:
        sizes = (32, 32, 4, 3) if window else (64, 32, 8, 3)
    else:
        sizes = (128, 32, 8, 5)
    return _as_tile(*sizes)


def _as_tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> tiles.Tile:
    sizes = {"block_m": block_m, "block_n": block_n}
    return sizes | {"num_warps": num_warps, "num_stages": num_stages}


def candidates(kernel: str, **key: int | str) -> list[tiles.Tile]:
    """Fewer rows let two blocks share an SM, one computing weights while the other multiplies."""
    assert kernel == "prefill_attention"
    sizes = [
        (block_m, block_n, num_warps, num_stages)
        for block_m, num_warps in ((64, 4), (128, 4), (128, 8))
        for block_n in (32, 64, 128)
        for num_stages in (3, 5, 7)
        if block_n <= int(key["block_size"])
    ]
    return [_as_tile(*each) for each in sizes]


def _form(
    dtype: torch.dtype,
    policy: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    tile: tiles.Tile,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The kernel's constants and launch options."""
    features = features_per_token(head_dim, policy)
    constants = {
        "HKV": num_kv_heads,
        "G": group,
        "D": head_dim,
        "F": features,
        "BLOCK_SIZE": block_size,
        "BLOCK_D": triton.next_power_of_2(features) * (2 if policy == 4 else 1),
        "BLOCK_M": max(tile["block_m"], triton.next_power_of_2(group)),
        "BLOCK_N": min(tile["block_n"], block_size),
        "POLICY": policy,
        # The interpreter cannot multiply bf16 numbers.
        "EXACT": dtype == torch.float32 or (policy == 0 and interpreted()),
    }
    return constants, {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}


def compile_cases() -> list[CompileCase]:
    """Every kind of cache on both generations, then what differs: head sizes, masks, blocks."""
    return list(_cases())


def tile_case(kernel: str, key: dict[str, int | str], tile: tiles.Tile) -> CompileCase:
    """Of a tuned tile."""
    assert kernel == "prefill_attention"
    return _case(
        int(key["head_dim"]),
        policy_of(str(key["kv"])),
        group=int(key["group"]),
        block_size=int(key["block_size"]),
        tile=tile,
    )


def _cases() -> Iterator[CompileCase]:
    for hopper in (True, False):
        for policy in (0, 8, 4):
            yield _case(128, policy, hopper=hopper)
        yield _case(256, 0, hopper=hopper)
        yield _case(128, 16, hopper=hopper)
    yield _case(256, 8)
    yield _case(80, 4)
    yield _case(128, 0, masks=True)
    yield _case(64, 8, window=4096)
    for policy, hopper in ((0, True), (8, True), (0, False)):
        yield _case(256, policy, masks=True, hopper=hopper)
    yield _case(128, 0, block_size=16, group=7)
    yield _case(128, 0, torch.float32)
    yield _case(128, 8, torch.float32)


def _case(
    head_dim: int,
    policy: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    group: int = 4,
    block_size: int = 64,
    hopper: bool = True,
    tile: tiles.Tile | None = None,
    window: int | None = None,
    masks: bool = False,
) -> CompileCase:
    exact = dtype == torch.float32
    window = 4096 if masks else window
    tile = tile or default_tile(
        head_dim, policy, exact=exact, hopper=hopper, window=window is not None
    )
    constants, options = _form(dtype, policy, 8, group, head_dim, block_size, tile)
    q_dtype = torch.float16 if policy and head_dim > 128 else dtype
    cache = (torch.int32,) * 3 if policy else (dtype, dtype, None)
    kv = POLICY_NAMES[policy]
    name = f"{str(dtype).removeprefix('torch.')} {kv} D{head_dim} G{group} block {block_size}"
    name += f" tile {constants['BLOCK_M']}x{constants['BLOCK_N']} w{options['num_warps']}"
    return CompileCase(
        name + " window" * (window is not None) + " cap" * masks,
        prefill_kernel,
        (
            q_dtype, *cache, None, *(torch.int32,) * 4, dtype, 0.125,
            window, 50.0 if masks else None, 3, 5, 1024,
        ),
        constants,
        options,
        elements=constants["BLOCK_M"] * constants["BLOCK_N"],  # scores
        min_capability=90 if hopper and not exact else 89 if policy == 16 else 80,
        max_capability=999 if hopper or exact else 89,
    )  # fmt: skip
