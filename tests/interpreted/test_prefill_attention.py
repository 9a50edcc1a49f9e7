"""Attention of prompt chunks equals float64 attention over the same cache.

Slots of the cache that no sequence fills hold NaN, and so does the output before.
"""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from kernels.gpu import tiles
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICIES, LayerCache, QuantizedKV
from tests.interpreted.attention_reference import (
    Shape,
    attention_reference,
    random_cache,
    random_step,
)

RAGGED = [(1, 1), (40, 7), (48, 48), (33, 5), (50, 1), (70, 37)]  # keys and queries of sequences
SM_TILE = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1}


def make_step(lengths: list[tuple[int, int]], block_size: int, num_decodes: int = 0) -> GpuStep:
    step = random_step([n for n, _ in lengths], [n for _, n in lengths], block_size)
    longest = max((n for _, n in lengths[num_decodes:]), default=0)
    return replace(step, num_decodes=num_decodes, max_query_len=longest)


def queries(step: GpuStep, shape: Shape) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    size = (step.num_tokens, shape.num_heads, shape.head_dim)
    return torch.randn(size, generator=draw).to(shape.dtype)


def attend(
    q: Tensor,
    cache: LayerCache,
    step: GpuStep,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    out = torch.full_like(q, torch.nan)
    prefill_attention(
        q,
        cache,
        step,
        out,
        scale=q.shape[2] ** -0.5,
        window=window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
    )
    return out


def check(
    shape: Shape,
    lengths: list[tuple[int, int]],
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    step = make_step(lengths, shape.block_size)
    cache = random_cache(shape, step)
    q = queries(step, shape)
    found = attend(q, cache, step, window, soft_cap, alibi_slopes).double()
    expected = attention_reference(
        q,
        cache,
        step,
        scale=shape.head_dim**-0.5,
        window=window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
    )
    # The interpreter cuts a 16-bit result off instead of rounding it.
    bound = 2e-6 if shape.dtype == torch.float32 else torch.finfo(shape.dtype).eps
    assert (found - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("policy", POLICIES)
def test_ragged_chunks(policy: int) -> None:
    check(Shape(4, 1, 64, 16, policy), RAGGED)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int, policy: int) -> None:
    check(Shape(4, 2, head_dim, 32, policy), [(37, 20)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
def test_sixteen_bits(policy: int, dtype: torch.dtype) -> None:
    check(Shape(4, 2, 64, 64, policy, dtype), [(90, 20)])


@pytest.mark.parametrize(
    ("group", "policy"), [(1, 8), (3, 0), (5, 8), (6, 4), (7, 0), (8, 8), (16, 16)]
)
def test_groups(group: int, policy: int) -> None:
    """Where a tile's rows are no multiple of the group, the rest are nobody's."""
    check(Shape(2 * group, 2, 64, 32, policy), [(23, 23), (40, 9)])


@pytest.mark.parametrize("policy", [0, 4])
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_block_sizes(block_size: int, policy: int) -> None:
    check(Shape(4, 1, 64, block_size, policy), [(270, 20), (256, 3)])


@pytest.mark.parametrize(
    ("window", "policy"),
    [(1, 0), (5, 0), (16, 0), (33, 0), (47, 0), (1000, 0), (5, 8), (33, 4), (47, 16)],
)
def test_windows(window: int, policy: int) -> None:
    with tiles.trial("prefill_attention", SM_TILE):
        check(Shape(2, 1, 64, 16, policy), [(60, 21), (90, 37), (40, 1)], window)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("policy", [0, 8])
def test_alibi_and_soft_cap(policy: int, soft_cap: float | None, window: int | None) -> None:
    slopes = 2.0 ** -torch.arange(1, 7).float()
    check(Shape(6, 2, 64, 16, policy), [(60, 21)], window, soft_cap, slopes)


@pytest.mark.parametrize("policy", [0, 4, 16])
def test_soft_cap(policy: int) -> None:
    check(Shape(6, 2, 64, 16, policy), [(60, 21)], None, 2.0)


def test_large_scores() -> None:
    """Hidden scores above a row's largest by far more than float32's exponents."""
    step = make_step([(60, 21), (64, 64)], 16)
    cache = random_cache(Shape(4, 2, 64, 16), step)
    assert isinstance(cache, Tensor)
    cache *= 300
    q = queries(step, Shape(4, 2, 64, 16))
    expected = attention_reference(q, cache, step, scale=0.125, window=20)
    # float32 keeps scores of some thousands to 5e-4, which every probability is off by.
    error = (attend(q, cache, step, 20).double() - expected).abs().max()
    assert error < 5e-4 * expected.abs().max()


@pytest.mark.parametrize("policy", [4, 8])
def test_keys_far_from_zero(policy: int) -> None:
    """From -300 to 300, of queries whose features' sum is not small.

    An error of a zero is in all features of a key, and in its score: one of 0.25 gives 10 times
    the limit, which is what float16 keys leave.
    """
    shape = Shape(4, 1, 64, 16, policy, torch.float16)
    step = make_step([(90, 20)], 16)
    cache = random_cache(shape, step)
    assert isinstance(cache, QuantizedKV)
    params = cache.params.view(torch.float16).view(*cache.params.shape, 2)
    draw = torch.Generator().manual_seed(2)
    params[:, 0, :, 0] = (590 + 10 * torch.rand(params[:, 0, :, 0].shape, generator=draw)) / (
        2**policy - 1
    )
    params[:, 0, :, 1] = -300 + torch.rand(params[:, 0, :, 1].shape, generator=draw)
    q = (0.02 * queries(step, shape) + 0.1).to(shape.dtype)
    out = attend(q, cache, step)
    expected = attention_reference(q, cache, step, scale=0.125)
    assert (out.double() - expected).abs().max() < 4e-3 * expected.abs().max()


def test_more_sequences_than_one_look() -> None:
    lengths = [(1 + 5 * seq % 23, 1 + seq % 3 * (seq % 5 == 0)) for seq in range(70)]
    check(Shape(1, 1, 64, 16), [(max(keys, n), n) for keys, n in lengths])


def test_rows_before_the_chunks_are_left_alone() -> None:
    shape = Shape(8, 2, 64, 16)
    step = make_step([(9, 1), (16, 1), (40, 7), (64, 64)], 16, num_decodes=2)
    cache, q = random_cache(shape, step), queries(step, shape)
    found, expected = attend(q, cache, step), attention_reference(q, cache, step, scale=0.125)
    assert found[:2].isnan().all()
    torch.testing.assert_close(found[2:].double(), expected[2:], rtol=1e-5, atol=1e-5)


def test_padding_stores_nothing() -> None:
    shape = Shape(8, 2, 64, 16)
    step = make_step([(5, 5), (7, 0), (0, 1), (40, 7), (0, 1), (0, 3), (9, 0)], 16)
    cache, q = random_cache(shape, step), queries(step, shape)
    found = torch.full_like(q, 7.0)
    prefill_attention(q, cache, step, found, scale=0.125)
    expected = attention_reference(q, cache, step, scale=0.125)
    real = [0, 1, 2, 3, 4, *range(6, 13)]
    torch.testing.assert_close(found[real].double(), expected[real], rtol=1e-5, atol=1e-5)
    assert (found[[5, 13, 14, 15, 16]] == 7).all()


def test_a_step_of_decode_rows_only() -> None:
    shape = Shape(8, 2, 64, 16)
    step = make_step([(9, 1), (16, 1)], 16, num_decodes=2)
    assert attend(queries(step, shape), random_cache(shape, step), step).isnan().all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [None, 20])
def test_chunks_do_not_show(window: int | None, policy: int) -> None:
    """Bit by bit: however a prompt is cut, and whatever the slots of what follows hold."""
    shape = Shape(2, 1, 64, 16, policy)
    whole = make_step([(50, 50)], 16)
    cache, q = random_cache(shape, whole), queries(whole, shape)
    with tiles.trial("prefill_attention", SM_TILE):
        expected = attend(q, cache, whole, window)
        for chunks in ([17, 33], [1, 30, 1, 18]):
            for first, last in pairwise(accumulate(chunks, initial=0)):
                part = replace(
                    whole,
                    positions=whole.positions[first:last],
                    query_start_loc=torch.tensor([0, last - first], dtype=torch.int32),
                    context_lens=torch.tensor([last], dtype=torch.int32),
                )
                found = attend(q[first:last], cache, part, window)
                assert torch.equal(found, expected[first:last])
