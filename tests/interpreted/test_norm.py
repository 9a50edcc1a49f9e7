"""Norm, gate and the sum of parts: each kernel against the launcher's torch code, in float64."""

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_mul
from kernels.norm import add_rms_norm
from kernels.partials import Partials, summed

EPS = 1e-5
# The interpreter cuts off what it rounds to bf16; each value is rounded up to three times.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found: Tensor, expected: Tensor, floor: float = 0.05) -> None:
    """`floor`: of what errors are relative to, where rounded values of that size cancel out."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs() / (expected.abs() + floor)
    assert float(error.max()) < TOLERANCE[found.dtype]


def partials(splits: int, m: int, n: int, bias: bool, dtype: torch.dtype) -> Partials:
    added = normal(n, seed=99, dtype=dtype) if bias else None
    return Partials(normal(splits, m, n, seed=98), added, dtype)


def sum64(x: Partials) -> Tensor:
    total = x.data.double().sum(0)
    return total if x.bias is None else total + x.bias.double()


def norm64(total: Tensor, weight: Tensor) -> Tensor:
    return total / (total.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "h"), [(1, 64), (3, 128), (2, 200), (5, 4096)])
def test_add_rms_norm(dtype: torch.dtype, m: int, h: int) -> None:
    x, residual = normal(m, h, seed=0, dtype=dtype), normal(m, h, seed=1, dtype=dtype)
    weight = normal(h, seed=2, dtype=dtype)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    expected = x.double() + residual.double()
    check(total, expected)
    check(normed, norm64(expected, weight))
    normed, total = add_rms_norm(x, None, weight, EPS)
    assert torch.equal(total, x)
    check(normed, norm64(x.double(), weight))


def test_values_are_rounded_where_torch_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16, which the interpreter rounds to nearest; the mean's order of sums may differ."""
    x, residual = (normal(8, 512, seed=seed, dtype=torch.float16) for seed in (0, 1))
    weight = normal(512, seed=2, dtype=torch.float16)
    found = add_rms_norm(x, residual, weight, EPS)
    gated = silu_mul(x)
    monkeypatch.setattr("kernels.norm.on_gpu", lambda x: False)
    monkeypatch.setattr("kernels.activation.on_gpu", lambda x: False)
    expected = add_rms_norm(x, residual, weight, EPS)
    assert (found[0] == expected[0]).float().mean() > 0.98
    assert torch.equal(found[1], expected[1])
    assert (gated == silu_mul(x)).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 5, 8])
def test_add_rms_norm_of_parts(dtype: torch.dtype, bias: bool, splits: int) -> None:
    x = partials(splits, 3, 96, bias, dtype)
    residual, weight = normal(3, 96, seed=1, dtype=dtype), normal(96, seed=2, dtype=dtype)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    expected = sum64(x) + residual.double()
    check(total, expected, floor=1)
    check(normed, norm64(expected, weight), floor=1)
    plain = add_rms_norm(summed(x), residual, weight, EPS)
    assert torch.equal(normed, plain[0])
    assert torch.equal(total, plain[1])
    normed, total = add_rms_norm(x, None, weight, EPS)
    assert torch.equal(total, summed(x))
    check(normed, norm64(sum64(x), weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "size"), [(1, 8), (3, 1100)])
def test_silu_mul(dtype: torch.dtype, m: int, size: int) -> None:
    x = normal(m, 2 * size, seed=3, dtype=dtype) * 3
    x[0, 0], x[0, 1] = -60, 60
    gate, up = x.double().chunk(2, dim=1)
    check(silu_mul(x), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("splits", [1, 4])
def test_silu_mul_of_parts(splits: int, bias: bool) -> None:
    x = partials(splits, 3, 80, bias, torch.float16)
    gate, up = sum64(x).chunk(2, dim=1)
    check(silu_mul(x), gate * torch.sigmoid(gate) * up)
    assert torch.equal(silu_mul(x), silu_mul(summed(x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("splits", "m", "n"), [(1, 1, 16), (2, 3, 1030), (8, 2, 40)])
def test_sum(dtype: torch.dtype, bias: bool, splits: int, m: int, n: int) -> None:
    x = partials(splits, m, n, bias, dtype)
    check(summed(x), sum64(x))
