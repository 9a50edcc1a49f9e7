"""Every linear kernel against float64 arithmetic on the values it was given, few rows and many."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.quantize.rtn import quantize_rtn
from engine.weights.matrix import Int4Matrix
from kernels import cpu
from kernels.cpu.int4 import AmxInt4Weight
from kernels.dense_linear import dense_linear, pack_dense
from kernels.gpu.w4a16_pack import W4A16Weight
from kernels.int4_aten import AtenInt4Weight, aten_int4_linear, pack_aten_int4
from kernels.int4_linear import Int4Weight, int4_linear, pack_int4
from kernels.int8_linear import ROW_BLOCK, has_int8_kernel, int8_linear, pack_int8, pack_int8_values

ROWS = (1, 4, 5, 6, 7, 8, 9, 33)  # both sides of what every CPU gives to the 4-bit kernel
# Error of y relative to its norm, as kernels/int4_linear.py documents it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
INT8_TOLERANCE = 1.5e-2
DTYPES = list(TOLERANCE)

needs_int8 = pytest.mark.skipif(
    not has_int8_kernel("cpu", torch.bfloat16), reason="no int8 kernel on this CPU"
)


needs_amx = pytest.mark.skipif(
    cpu.library() is None, reason="no AMX, or installed without a compiler"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def linear64(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def few_rows_of(weight: AtenInt4Weight) -> int:
    return weight.few_rows.max_rows if weight.few_rows is not None else 0


def quantized(
    rows: int, columns: int, group_size: int, dtype: torch.dtype, int8_activations: bool = False
) -> tuple[Int4Weight, Tensor]:
    """A packed weight and its exact value [N, K]."""
    stored = quantize_rtn(normal(rows, columns), group_size)
    packed = pack_int4(stored.q, stored.zeros, stored.scales, dtype, "cpu", int8_activations)
    return packed, stored.dequantize()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("k", "group_size"), [(256, 32), (256, 64), (384, 128), (96, 96)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4(dtype: torch.dtype, k: int, group_size: int, num_rows: int, bias: bool) -> None:
    weight, exact = quantized(64, k, group_size, dtype)
    x = normal(num_rows, k, seed=1).to(dtype)
    added = normal(64, seed=2).to(dtype) if bias else None
    y = int4_linear(x, weight, added)
    assert y.dtype == dtype
    assert weight.shape == (64, k)
    assert relative_error(y, linear64(x, exact, added)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("num_outputs", [8, 24, 40])
@pytest.mark.parametrize("num_rows", ROWS)
def test_int4_with_outputs_the_4_bit_kernel_cannot_tile(num_rows: int, num_outputs: int) -> None:
    weight, exact = quantized(num_outputs, 128, 64, torch.bfloat16)
    x = normal(num_rows, 128, seed=1).bfloat16()
    error = relative_error(int4_linear(x, weight, None), linear64(x, exact, None))
    assert error < TOLERANCE[torch.bfloat16]


@pytest.mark.usefixtures("kernels")
def test_int4_extremes_of_q_and_zero() -> None:
    """The 4-bit kernel's (q - 8) * scale + (8 - zero) * scale, at every corner."""
    q = torch.tensor([0, 15], dtype=torch.uint8).repeat(64, 16)  # [K, N]
    zeros = torch.tensor([0, 0, 15, 15], dtype=torch.uint8).repeat(2, 8)  # [K/g, N]
    scales = torch.full((2, 32), 0.5)
    weight = pack_int4(q, zeros, scales, torch.bfloat16, "cpu")
    x = normal(2, 64).bfloat16()
    expected = linear64(x, Int4Matrix(q, zeros, scales).dequantize(), None)
    assert relative_error(int4_linear(x, weight, None), expected) < TOLERANCE[torch.bfloat16]


def ordered(
    dtype: torch.dtype, int8_activations: bool = False, padded: bool = True
) -> tuple[Int4Weight, Tensor]:
    """A packed weight of 64 outputs whose inputs are sorted by group, and its exact value.

    `padded`: the last group has only 20 of its 32 inputs, and 12 rows of its zero point.
    """
    num_inputs = 84 if padded else 96
    stored = quantize_rtn(normal(64, 96), 32)
    order = torch.randperm(num_inputs, generator=torch.Generator().manual_seed(3))
    padding = order[64:65].repeat(96 - num_inputs)
    stored.q[num_inputs:] = stored.zeros[2]
    weight = pack_int4(
        stored.q,
        stored.zeros,
        stored.scales,
        dtype,
        "cpu",
        int8_activations,
        torch.cat((order, padding)),
    )
    exact = torch.zeros(64, num_inputs)
    exact[:, order] = stored.dequantize()[:, :num_inputs]
    return weight, exact


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_whose_inputs_have_an_order(dtype: torch.dtype, num_rows: int, padded: bool) -> None:
    weight, exact = ordered(dtype, padded=padded)
    x, added = normal(num_rows, exact.shape[1], seed=1).to(dtype), normal(64, seed=2).to(dtype)
    y = int4_linear(x, weight, added)
    assert relative_error(y, linear64(x, exact, added)) < TOLERANCE[dtype]


@needs_int8
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("num_rows", ROWS)
def test_int4_whose_inputs_have_an_order_with_int8_activations(num_rows: int) -> None:
    weight, exact = ordered(torch.bfloat16, int8_activations=True)
    x = normal(num_rows, exact.shape[1], seed=1).bfloat16()
    error = relative_error(int4_linear(x, weight, None), linear64(x, exact, None))
    assert error < INT8_TOLERANCE


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("group_size", "packed_size"), [(96, 32), (512, 256), (640, 128)])
def test_groups_that_no_cpu_kernel_takes_become_smaller(group_size: int, packed_size: int) -> None:
    """One group of all inputs among them: its scale is repeated, and the weight stays int4."""
    weight, _ = quantized(64, group_size, group_size, torch.bfloat16)
    assert not isinstance(weight, W4A16Weight)
    few = weight if isinstance(weight, AmxInt4Weight) else weight.few_rows
    assert few is not None
    assert few.group_size == packed_size


def test_int4_forms_differ_by_one_rounding() -> None:
    """What a row's result may move by when other rows join its step."""
    stored = quantize_rtn(normal(256, 1024), 128)
    weight = pack_aten_int4(stored.q, stored.zeros, stored.scales, torch.bfloat16, "cpu")
    assert weight.few_rows is not None
    x = normal(weight.few_rows.max_rows, 1024, seed=1).bfloat16()
    many = aten_int4_linear(x, replace(weight, few_rows=None), None).double()
    assert 0 < relative_error(aten_int4_linear(x, weight, None), many) < 4e-3


@needs_amx
@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_amx_int4_rows_do_not_see_each_other(group_size: int, int8_activations: bool) -> None:
    """Bit for bit, across every edge of the kernel's row blocks; what fixes a seed's tokens."""
    weight, exact = quantized(80, 4 * group_size, group_size, torch.bfloat16, int8_activations)
    assert isinstance(weight, AmxInt4Weight)
    x, bias = normal(300, 4 * group_size, seed=1).bfloat16(), normal(80, seed=2).bfloat16()
    together = int4_linear(x, weight, bias)
    assert relative_error(together, linear64(x, exact, bias)) < 1e-2
    for num_rows in (1, 2, 15, 16, 17, 32, 33, 48, 127, 128, 129, 256, 257):
        assert torch.equal(int4_linear(x[:num_rows], weight, bias), together[:num_rows])
    assert torch.equal(int4_linear(x[7::9], weight, bias), together[7::9])


@needs_amx
@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_amx_int4_does_not_hide_a_nan(poison: float, int8_activations: bool) -> None:
    weight, _ = quantized(32, 256, 64, torch.bfloat16, int8_activations)
    x = normal(3, 256, seed=1).bfloat16()
    x[1, 100] = poison
    finite = int4_linear(x, weight, None).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, True]


@needs_int8
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.usefixtures("kernels")
def test_int4_with_int8_activations(group_size: int, num_rows: int, bias: bool) -> None:
    weight, exact = quantized(64, 512, group_size, torch.bfloat16, int8_activations=True)
    x = normal(num_rows, 512, seed=1).bfloat16()
    added = normal(64, seed=2).bfloat16() if bias else None
    assert not isinstance(weight, W4A16Weight)
    assert weight.int8_activations
    few = isinstance(weight, AtenInt4Weight) and num_rows <= few_rows_of(weight)
    bound = TOLERANCE[torch.bfloat16] if few else INT8_TOLERANCE
    assert relative_error(int4_linear(x, weight, added), linear64(x, exact, added)) < bound


def test_float32_is_exact_whatever_was_asked() -> None:
    weight, exact = quantized(64, 128, 32, torch.float32, int8_activations=True)
    assert isinstance(weight, AtenInt4Weight)
    assert not weight.int8_activations
    x = normal(7, 128, seed=1)
    assert torch.equal(int4_linear(x, weight, None), torch.nn.functional.linear(x, exact))


@needs_int8
@pytest.mark.parametrize(("n", "k"), [(1, 16), (31, 33), (64, 257), (130, 96)])
@pytest.mark.parametrize("num_rows", [1, 2, 19, ROW_BLOCK, ROW_BLOCK + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8(dtype: torch.dtype, num_rows: int, n: int, k: int) -> None:
    weight, x, bias = normal(n, k), normal(num_rows, k, seed=1).to(dtype), normal(n, seed=2)
    y = int8_linear(x, pack_int8(weight), bias.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, linear64(x, weight, bias.to(dtype))) < INT8_TOLERANCE


@needs_int8
def test_int8_is_the_documented_sum() -> None:
    """Exact up to float32: the integers are what the docstring says, the sum is int32."""
    weight, x = normal(48, 320).double(), normal(5, 320, seed=1).double()
    weight_scale = weight.abs().amax(1, keepdim=True) / 127
    row_scale = x.abs().amax(1, keepdim=True) / 126
    expected = (x / row_scale + 0.5).floor() @ (weight / weight_scale).round().t()
    expected *= row_scale * weight_scale.t()
    y = int8_linear(x.float(), pack_int8(weight.float()), None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@needs_int8
def test_int8_values_are_multiplied_as_they_are() -> None:
    """Exact up to the rows' rounding: values from a file are not quantised anew."""
    values = torch.randint(-128, 128, (48, 320), generator=torch.Generator().manual_seed(0))
    scales = normal(48, seed=1).abs() + 0.1
    x = torch.diag(torch.full((320,), 126.0))  # rows that int8 holds exactly
    y = int8_linear(x, pack_int8_values(values.to(torch.int8), scales), None)
    torch.testing.assert_close(y, 126 * (values * scales.unsqueeze(1)).t(), rtol=1e-6, atol=0)


@needs_int8
def test_int8_rows_do_not_see_each_other() -> None:
    weight = pack_int8(normal(64, 128))
    x = normal(6, 128, seed=1).bfloat16() * torch.logspace(-3, 3, 6).bfloat16().unsqueeze(1)
    together = int8_linear(x, weight, None)
    for row in range(6):
        assert torch.equal(int8_linear(x[row : row + 1], weight, None)[0], together[row])


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_extremes_do_not_wrap(dtype: torch.dtype) -> None:
    """The largest value of a row comes back near itself whatever its scale was rounded to."""
    x = torch.diag(torch.linspace(1.0, 2.0, 64)).to(dtype)
    y = int8_linear(torch.cat((x, -x)), pack_int8(torch.eye(64)), None)
    expected = torch.cat((x, -x)).double()
    torch.testing.assert_close(y.double(), expected, rtol=1.2e-2, atol=0.0)


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_of_zeros_is_zero(dtype: torch.dtype) -> None:
    weight = normal(32, 64)
    weight[3] = 0
    x = normal(3, 64, seed=1).to(dtype)
    x[1] = 0
    y = int8_linear(x, pack_int8(weight), None)
    assert y.isfinite().all()
    assert not y[1].any()
    assert not y[:, 3].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (24, 40), (131, 48)])
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense(dtype: torch.dtype, num_rows: int, n: int, k: int, bias: bool) -> None:
    weight, x = normal(n, k).to(dtype), normal(num_rows, k, seed=1).to(dtype)
    added = normal(n, seed=2).to(dtype) if bias else None
    packed = pack_dense(weight)
    assert packed.shape == (n, k)
    y = dense_linear(x, packed, added)
    assert y.dtype == dtype
    assert relative_error(y, linear64(x, weight, added)) < TOLERANCE[dtype]


def test_dense_float32_is_kept_as_it_is() -> None:
    weight = normal(8, 16)
    assert pack_dense(weight).data is weight
