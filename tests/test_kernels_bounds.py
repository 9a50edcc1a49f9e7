"""The compiled kernels stay within their operands, whatever the shapes, and refuse wrong ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.quantize.rtn import quantize_rtn
from kernels import cpu
from kernels.activation import silu_mul
from kernels.attention import AttentionMetadata, paged_attention, store_kv
from kernels.cpu.int4 import AmxInt4Weight, amx_int4_linear, pack_amx_int4
from kernels.norm import add_rms_norm, head_rms_norm_
from kernels.rope import apply_rope_
from tests.guarded import guarded
from tests.test_kernels_attention import make_case
from tests.test_kernels_elementwise import norm64
from tests.test_kernels_linear import linear64, normal

pytestmark = pytest.mark.skipif(
    cpu.library() is None, reason="no AMX, or installed without a compiler"
)
BF16_EPS = torch.finfo(torch.bfloat16).eps


def int4_weight(n: int, k: int, group_size: int, int8: bool) -> tuple[AmxInt4Weight, Tensor]:
    stored = quantize_rtn(normal(n, k), group_size)
    weight = pack_amx_int4(stored.q, stored.zeros, stored.scales, int8)
    weight = replace(
        weight,
        packed=guarded(weight.packed),
        scales=guarded(weight.scales),
        zeros=guarded(weight.zeros),
    )
    return weight, stored.dequantize()


@settings(max_examples=60)
@given(
    m=st.integers(1, 150),
    n=st.integers(1, 100),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 128, 256]),
    int8=st.booleans(),
    bias=st.booleans(),
    margin=st.sampled_from([0, 1, 16]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_int4_linear(
    m: int, n: int, groups: int, group_size: int, int8: bool, bias: bool, margin: int, threads: int
) -> None:
    """Any rows, any outputs, rows apart or not, more threads than panels."""
    k = groups * group_size
    weight, exact = int4_weight(n, k, group_size, int8)
    x = guarded(normal(m, k + margin, seed=1).bfloat16()[:, :k])
    added = guarded(normal(n, seed=2).bfloat16()) if bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = amx_int4_linear(x, weight, added)
    finally:
        torch.set_num_threads(before)
    assert y.shape == (m, n)
    product, expected = linear64(x, exact, None), linear64(x, exact, added)
    lengths = x.double().norm(dim=1, keepdim=True) * exact.double().norm(dim=1)
    bound = BF16_EPS * (product.abs() + expected.abs()) + (2e-2 if int8 else 1e-5) * lengths
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("int8", [False, True])
def test_int4_linear_of_no_rows(int8: bool) -> None:
    weight, _ = int4_weight(24, 64, 32, int8)
    assert amx_int4_linear(torch.empty(0, 64, dtype=torch.bfloat16), weight, None).shape == (0, 24)


@settings(max_examples=60)
@given(
    heads=st.sampled_from([(1, 1), (7, 1), (16, 1), (4, 2), (3, 3), (32, 2)]),
    head_dim=st.sampled_from([32, 64, 96, 128, 256]),
    block_size=st.sampled_from([16, 48, 64]),
    window=st.sampled_from([None, 1, 15, 16, 17, 100]),
    lengths=st.lists(st.integers(0, 130), min_size=1, max_size=5),
)
def test_decode_attention(
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int | None,
    lengths: list[int],
) -> None:
    """Queries are a slice of a fused projection; every operand ends at a forbidden page."""
    case = make_case(
        [(length, 1) for length in lengths], (*heads, head_dim), window, torch.bfloat16, block_size
    )
    num_heads = heads[0]
    fused = torch.cat((case.q, case.kv), dim=1).bfloat16()
    q, kv = guarded(fused[:, :num_heads]), guarded(fused[:, num_heads:])
    cache = guarded(case.cache.bfloat16())
    meta = guarded_meta(case.meta)
    store_kv(kv, cache, meta)
    found = paged_attention(q, cache, meta, head_dim**-0.5, window).double()
    assert (found - case.expected).norm() / case.expected.norm() < 2 * BF16_EPS


def guarded_meta(meta: AttentionMetadata) -> AttentionMetadata:
    def copy(array: np.ndarray[Any, np.dtype[np.int32]]) -> np.ndarray[Any, np.dtype[np.int32]]:
        return guarded(torch.from_numpy(array)).numpy()

    return AttentionMetadata.build(
        query_start_loc=meta.query_start_loc,
        context_lens=copy(meta.context_lens),
        block_tables=copy(meta.block_tables),
        slot_mapping=copy(meta.slot_mapping),
        num_decodes=meta.num_decodes,
        block_size=meta.block_size,
        device="cpu",
    )


@settings(max_examples=60)
@given(rows=st.integers(0, 70), heads=st.integers(1, 5), size=st.integers(1, 140))
def test_rows_of_any_size(rows: int, heads: int, size: int) -> None:
    """Norm, norm per head, SwiGLU and rope, of no rows too."""

    def draw(*shape: int) -> Tensor:
        return guarded(normal(*shape, seed=sum(shape)).bfloat16())

    def near(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.double(), expected, rtol=2 * BF16_EPS, atol=4 * BF16_EPS)

    x, residual, weight = draw(rows, size), draw(rows, size), draw(size)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    near(normed, norm64(total, weight))
    gate_up = draw(rows, 2 * size)
    gate, up = gate_up.double().chunk(2, dim=1)
    near(silu_mul(gate_up), gate * torch.sigmoid(gate) * up)
    turned, weights = draw(rows, heads, size), draw(heads, size)
    before = turned.double()
    head_rms_norm_(turned, weights, 1e-5)
    near(turned, norm64(before, weights))
    half = size // 2
    before = turned.double()
    cos, sin = draw(rows, 1, 2 * half), draw(rows, 1, 2 * half)
    apply_rope_(turned, cos, sin)
    swapped = torch.cat((before[..., half : 2 * half], before[..., :half]), dim=-1)
    before[..., : 2 * half] *= cos.double()
    before[..., : 2 * half] += swapped * sin.double()
    near(turned, before)


@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_attention_does_not_hide_a_nan(place: str) -> None:
    """As in torch: who sees it gets NaN, which the sampler reports, and nobody else does."""
    case = make_case([(20, 1), (20, 1)], (4, 2, 64), None, torch.bfloat16, 16)
    kv = case.kv.bfloat16()
    q = case.q.bfloat16()
    if place == "query":
        q[0, :, 3] = torch.nan
    else:
        kv[0, slice(0, 2) if place == "key" else slice(2, 4), 3] = torch.nan
    cache = case.cache.bfloat16()
    store_kv(kv, cache, case.meta)
    found = paged_attention(q, cache, case.meta, 0.125, None)
    assert found[0].isnan().any(-1).all()
    assert found[1].isfinite().all()


def test_wrong_operands_are_refused() -> None:
    """By address alone they would be read as other numbers, or as somebody's memory."""
    weight, _ = int4_weight(32, 64, 32, False)
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    for x, bias in (
        (rows.float(), None),
        (torch.zeros(64, 4, dtype=torch.bfloat16).t(), None),
        (rows, torch.zeros(32)),
        (rows, torch.zeros(31, dtype=torch.bfloat16)),
    ):
        with pytest.raises(AssertionError):
            amx_int4_linear(x, weight, bias)
    with pytest.raises(AssertionError):
        add_rms_norm(rows, rows[:1], rows[0], 1e-5)
    with pytest.raises(AssertionError):
        add_rms_norm(rows, rows, rows[0].float(), 1e-5)
    with pytest.raises(AssertionError):
        silu_mul(rows[:, :32])
    with pytest.raises(AssertionError):
        apply_rope_(rows.view(4, 2, 32), rows[:1, None, :32], rows[:1, None, :32])
    case = make_case([(20, 1)], (4, 2, 64), None, torch.bfloat16, 16)
    with pytest.raises(AssertionError):
        store_kv(case.kv.bfloat16(), case.cache, case.meta)
    with pytest.raises(AssertionError):
        paged_attention(case.q.bfloat16(), case.cache, case.meta, 0.125, None)
