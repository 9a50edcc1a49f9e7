"""RMSNorm, rotary embedding and SwiGLU against float64 formulas."""

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_mul
from kernels.norm import add_rms_norm, head_rms_norm_, rms_norm
from kernels.partials import Partials
from kernels.rope import apply_rope_, signed_sin

pytestmark = pytest.mark.usefixtures("kernels")

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, expected: Tensor, roundings: int) -> None:
    """Equal but for so many roundings to found's dtype."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=roundings * eps, atol=4 * eps)


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 9, 33])
@pytest.mark.parametrize("size", [8, 48, 1000])
def test_rms_norm(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    x, weight = normal(num_tokens, size, dtype=dtype), normal(size, dtype=dtype, seed=1)
    assert_near(rms_norm(x, weight, EPS), norm64(x, weight), roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 300.0])
def test_rms_norm_of_small_and_large_rows(dtype: torch.dtype, scale: float) -> None:
    """eps counts where the row is small; squares of large bf16 rows do not overflow."""
    x, weight = normal(3, 64, dtype=dtype) * scale, normal(64, dtype=dtype, seed=1)
    assert_near(rms_norm(x, weight, EPS), norm64(x, weight), roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_per_head(dtype: torch.dtype) -> None:
    """In place, in a slice as the decoder has it: what is beside it stays."""
    qkv, weight = normal(5, 9, 24, dtype=dtype), normal(6, 24, dtype=dtype, seed=1)
    before = qkv.clone()
    head_rms_norm_(qkv[:, :6], weight, EPS)
    assert_near(qkv[:, :6], norm64(before[:, :6], weight), roundings=2)
    assert torch.equal(qkv[:, 6:], before[:, 6:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_add_rms_norm(dtype: torch.dtype, num_tokens: int) -> None:
    x, residual = normal(num_tokens, 48, dtype=dtype), normal(num_tokens, 48, dtype=dtype, seed=1)
    weight = normal(48, dtype=dtype, seed=2)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert_near(normed, norm64(total, weight), roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_norm_has_no_residual(dtype: torch.dtype) -> None:
    x, weight = normal(3, 48, dtype=dtype), normal(48, dtype=dtype, seed=2)
    normed, total = add_rms_norm(x, None, weight, EPS)
    assert torch.equal(total, x)
    assert_near(normed, norm64(x, weight), roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_parts_of_a_product_are_added_up_first(dtype: torch.dtype, biased: bool) -> None:
    bias = normal(48, dtype=dtype, seed=3) if biased else None
    parts = Partials(normal(3, 5, 48, dtype=torch.float32), bias, dtype)
    exact = parts.data.double().sum(0) + (0 if bias is None else bias.double())
    assert_near(parts.sum(), exact, roundings=1)
    residual, weight = normal(5, 48, dtype=dtype, seed=1), normal(48, dtype=dtype, seed=2)
    plain = add_rms_norm(parts.sum(), residual, weight, EPS)
    for found, expected in zip(add_rms_norm(parts, residual, weight, EPS), plain, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(silu_mul(parts), silu_mul(parts.sum()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(24, 24), (64, 64), (80, 32), (16, 2)])
@pytest.mark.parametrize("num_tokens", [1, 11])
def test_rope(dtype: torch.dtype, head_dim: int, rotary_dim: int, num_tokens: int) -> None:
    """Each pair (i, i + R/2) turns as a complex number by its angle; the rest is kept."""
    x = normal(num_tokens, 5, head_dim, dtype=dtype)
    angles = normal(num_tokens, 1, rotary_dim // 2, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    half = rotary_dim // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:rotary_dim].double())
    turned = turned * torch.complex(cos[..., :half].double(), sin[..., :half].double())
    expected = torch.cat((turned.real, turned.imag, x[..., rotary_dim:].double()), dim=-1)
    apply_rope_(x, cos, signed_sin(sin))
    assert_near(x, expected, roundings=2)


def test_rope_writes_through_a_slice() -> None:
    """The decoder rotates q and k where its fused projection left them."""
    qkv = normal(3, 6, 8, dtype=torch.float32)
    before = qkv.clone()
    angles = normal(3, 1, 4, dtype=torch.float32, seed=1).repeat(1, 1, 2)
    apply_rope_(qkv[:, :4], angles.cos(), signed_sin(angles.sin()))
    assert torch.equal(qkv[:, 4:], before[:, 4:])
    assert not torch.equal(qkv[:, :4], before[:, :4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 7), (13, 48), (70, 1000)])
def test_silu_mul(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    gate_up = normal(num_tokens, 2 * size, dtype=dtype) * 3
    gate_up[0, 0], gate_up[0, 1] = -1000, 1000  # where a careless sigmoid overflows
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_near(silu_mul(gate_up), gate * torch.sigmoid(gate) * up, roundings=2)
