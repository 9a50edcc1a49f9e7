"""Decode attention over every kind of cache, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_attention
from kernels.gpu import decode_attention as module
from kernels.gpu import tiles
from kernels.gpu.decode_attention import candidates, decode_attention
from kernels.gpu.decode_attention_tiles import Tile, num_splits
from kernels.kv_layout import QuantizedKV
from tests.interpreted.attention_reference import (
    Shape,
    attention_reference,
    random_cache,
    random_step,
)

# Rounding of probabilities (float16 and bf16 ones) and of the output, relative to its largest.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# One token, a full block of 32, one more, whole tiles, padding, ragged.
RAGGED = [1, 32, 97, 0, 128]


def check(
    shape: Shape,
    context_lens: list[int],
    *,
    splits: int = 1,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    patch: pytest.MonkeyPatch,
) -> None:
    """`splits` at most: as many as the longest sequence has tiles."""
    programs = len(context_lens) * shape.num_kv_heads * (1 if shape.num_heads <= 64 else 2)
    patch.setattr(module, "_num_sms", lambda _: -(-splits * programs // 3))
    step = random_step(context_lens, [1] * len(context_lens), shape.block_size)
    cache = random_cache(shape, step)
    q = random_queries(shape, len(context_lens))
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    scale = shape.head_dim**-0.5
    masks: dict[str, Any] = {"window": window, "soft_cap": soft_cap, "alibi_slopes": alibi_slopes}
    decode_attention(q, cache, step, out, scale=scale, **masks)
    expected = attention_reference(q, cache, step, scale=scale, **masks)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    tolerance = TOLERANCES[shape.dtype]
    assert error < tolerance, error
    assert out[step.context_lens == 0].eq(0).all()


def random_queries(shape: Shape, num_seqs: int) -> Tensor:
    """A view of rows that hold keys and values too, as the engine's are."""
    generator = torch.Generator().manual_seed(1)
    size = (num_seqs, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    return torch.randn(size, generator=generator).to(shape.dtype)[:, : shape.num_heads]


@pytest.mark.parametrize(
    ("head_dim", "splits"), [(64, 1), (64, 3), (80, 3), (96, 1), (128, 2), (256, 3)]
)
@pytest.mark.parametrize("policy", [0, 4, 8, 16])
def test_caches_and_head_sizes(
    policy: int, head_dim: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(Shape(3, 1, head_dim, 32, policy), RAGGED, splits=splits, patch=monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", [0, 4, 8, 16])
def test_half_precision(policy: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Shape(4, 1, 64, 32, policy, dtype), RAGGED, splits=2, patch=monkeypatch)


@pytest.mark.parametrize(
    ("policy", "group"),
    [(0, 1), (0, 2), (0, 7), (0, 16), (0, 40), (8, 1), (8, 5), (8, 6), (8, 40), (4, 8), (16, 16)],
)
def test_groups_of_query_heads(policy: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Shape(2 * group, 2, 64, 32, policy), [40], splits=2, patch=monkeypatch)


@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
@pytest.mark.parametrize("policy", [0, 4])
def test_block_sizes(policy: int, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Shape(4, 1, 64, block_size, policy), [64, 300], splits=2, patch=monkeypatch)


@pytest.mark.parametrize(
    ("policy", "window"),
    [(0, 1), (0, 7), (0, 32), (0, 70), (0, 1000), (8, 1), (8, 70), (4, 7), (4, 32), (16, 70)],
)
def test_windows(policy: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Shape(4, 1, 64, 32, policy), RAGGED, splits=2, window=window, patch=monkeypatch)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("policy", [0, 4, 16])
def test_soft_cap_and_alibi(
    policy: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(6, 2, 64, 32, policy)
    context_lens = [97, 0]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.06, 0.03, 0.01])
    check(shape, context_lens, splits=2, soft_cap=2.0, window=window, patch=monkeypatch)
    check(shape, context_lens, splits=2, alibi_slopes=slopes, window=window, patch=monkeypatch)


@pytest.mark.parametrize("policy", [4, 8, 16])
@pytest.mark.parametrize(("q_scale", "v_scale"), [(1e6, 1.0), (1e-6, 1.0), (1.0, 1e-4), (1.0, 1e3)])
def test_ranges_that_float16_has_not(policy: int, q_scale: float, v_scale: float) -> None:
    """Large and small queries, and values whose scales and probabilities float16 would lose."""
    shape = Shape(4, 1, 64, 32, policy, torch.bfloat16)
    step = random_step([100], [1], 32)
    cache = random_cache(shape, step)
    assert isinstance(cache, QuantizedKV)
    params = cache.params.view(torch.float16).view(*cache.params.shape, 2)
    params[:, 1] *= v_scale
    q = random_queries(shape, 1) * q_scale
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    decode_attention(q, cache, step, out, scale=0.125 / q_scale)
    expected = attention_reference(q, cache, step, scale=0.125 / q_scale)
    assert (out.double() - expected).abs().max() < 1e-2 * expected.abs().max()


def test_a_long_tail_of_small_probabilities_counts() -> None:
    """Of 2^12 keys the first weighs as much as 2^13 others, and has 2^18 times their v scale.

    Its values are 0: what is left are products 2^-31 of the largest, which float16 has not.
    """
    shape = Shape(1, 1, 64, 64, 8, torch.float16)
    step = random_step([64 * 64], [1], 64)
    cache = random_cache(shape, step)
    assert isinstance(cache, QuantizedKV)
    first = int(step.block_tables[int(step.rows[0]), 0])
    params = cache.params.view(torch.float16).view(*cache.params.shape, 2)
    params[:, 0] = torch.tensor([0.0, 0.0])  # scores: 0, and 13 log(2) of the first key
    params[first, 0, 0, 1] = 1.0
    params[:, 1] = torch.tensor([2.0**-10, -(2.0**-3)])
    params[first, 1, 0] = torch.tensor([2.0**8, -(2.0**15)])
    cache.v.fill_(-1)  # every u is 255,
    cache.v[first, 0, 0] = -128  # that of the first key 128
    q = torch.full((1, 1, 64), 13 * 0.6931 / 64, dtype=torch.float16)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    decode_attention(q, cache, step, out, scale=1.0)
    expected = attention_reference(q, cache, step, scale=1.0)
    assert (out.double() - expected).abs().max() < 1e-2 * expected.abs().max()


def test_only_decode_rows_are_written() -> None:
    shape = Shape(4, 2, 64, 32)
    step = random_step([40, 5, 20], [1, 1, 7], 32)
    cache = random_cache(shape, step)
    q = random_queries(shape, 9)
    out = torch.full(q.shape, float("nan"))
    decode_attention(q, cache, step, out, scale=0.125)
    expected = attention_reference(q, cache, step, scale=0.125)
    assert torch.allclose(out[:2].double(), expected[:2], atol=1e-5)
    assert out[2:].isnan().all()


def test_padding_alone_gives_zeros() -> None:
    shape = Shape(4, 2, 64, 32, 8)
    step = random_step([0, 0], [1, 1], 32, max_context_len=4096)
    out = torch.full((2, 4, 64), float("nan"))
    decode_attention(random_queries(shape, 2), random_cache(shape, step), step, out, scale=1.0)
    assert out.eq(0).all()


@pytest.mark.parametrize("window", [None, 20])
def test_paged_attention_takes_decode_rows_and_chunks(window: int | None) -> None:
    shape = Shape(4, 2, 64, 16, 8)
    step = random_step([40, 5, 30], [1, 1, 7], 16)
    cache, q = random_cache(shape, step), random_queries(shape, 9).contiguous()
    out = paged_attention(q, cache, step, 0.125, window)
    expected = attention_reference(q, cache, step, scale=0.125, window=window)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_splits_fill_the_gpu_and_no_more() -> None:
    tile = Tile(tokens=64, rows=16, num_warps=4, num_stages=3, programs_per_sm=3)
    assert num_splits(programs=8, max_keys=8192, num_sms=132, tile=tile) == 49
    assert num_splits(programs=8, max_keys=1000, num_sms=132, tile=tile) == 16
    assert num_splits(programs=1, max_keys=8192, num_sms=132, tile=tile) == 64
    assert num_splits(programs=128, max_keys=8192, num_sms=132, tile=tile) == 3
    assert num_splits(programs=512, max_keys=8192, num_sms=132, tile=tile) == 1


def test_a_long_sequence_is_split_among_many_short_ones() -> None:
    tile = Tile(tokens=64, rows=16, num_warps=4, num_stages=3, programs_per_sm=3)
    assert num_splits(programs=512, max_keys=8193, num_sms=132, tile=tile) == 2


def test_a_long_session_does_not_split_many_short_sequences() -> None:
    tile = Tile(tokens=64, rows=16, num_warps=4, num_stages=3, programs_per_sm=3)
    assert num_splits(programs=2048, max_keys=131072, num_sms=132, tile=tile) == 2
    assert num_splits(programs=128, max_keys=131072, num_sms=132, tile=tile) == 6
    assert num_splits(programs=8, max_keys=131072, num_sms=132, tile=tile) == 49


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_tuned_tiles_compute_the_same(kv: str) -> None:
    shape = Shape(8, 2, 64, 64, 8 if kv == "int8" else 0)
    step = random_step([150], [1], 64)
    cache, q = random_cache(shape, step), random_queries(shape, 1)
    expected = attention_reference(q, cache, step, scale=0.125)
    tried = candidates("decode_attention", head_dim=64, group=4, kv=kv, block_size=64)
    for tile in {(tile["tokens"], tile["rows"]): tile for tile in tried}.values():
        out = torch.full(q.shape, float("nan"))
        with tiles.trial("decode_attention", tile) as asked:
            decode_attention(q, cache, step, out, scale=0.125)
        assert [key["group"] for key in asked] == [4]
        assert torch.allclose(out.double(), expected, atol=1e-5)
