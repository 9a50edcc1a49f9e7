"""Round to nearest and its grids, against the definition in float64."""

import numpy as np
import pytest
import torch

from engine.errors import ConfigError
from engine.quantize.grid import MIN_SCALE
from engine.quantize.layer import ROLES
from engine.quantize.method import relative_error, split_outputs
from engine.quantize.rtn import Rtn, quantize_rtn
from engine.quantize.statistics import Statistics
from engine.weights.matrix import Int4Matrix
from engine.weights.stored import to_dense
from tests.quantize_cases import inputs, loss, tiny_layer, values, weight


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_weight_is_at_the_nearest_level_of_its_group(
    group_size: int, symmetric: bool
) -> None:
    exact = weight(24, 256)
    matrix = quantize_rtn(exact, group_size, symmetric)
    size = 256 if group_size == -1 else group_size
    assert matrix.q.shape == (256, 24)
    assert matrix.scales.shape == matrix.zeros.shape == (256 // size, 24)
    assert matrix.scales.dtype == torch.float16
    for row in range(24):
        for group in range(256 // size):
            own = exact[row, group * size : (group + 1) * size].double().numpy()
            scale, zero = float(matrix.scales[group, row]), int(matrix.zeros[group, row])
            if symmetric:
                assert zero == 8
                assert scale == pytest.approx(abs(own).max() / 7.5, rel=2**-10)
            else:
                reach = max(own.max(), 0.0) - min(own.min(), 0.0)
                assert scale == pytest.approx(reach / 15, rel=2**-10)
            allowed = (np.arange(16) - zero) * scale
            nearest = np.abs(own[:, None] - allowed).min(1)
            found = values(matrix)[row, group * size : (group + 1) * size]
            np.testing.assert_allclose(np.abs(own - found), nearest, atol=1e-6)
            assert nearest.max() <= scale * (0.5 + 15 * 2**-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_as_their_values(dtype: torch.dtype) -> None:
    exact = weight(16, 64).to(dtype)
    half, single = quantize_rtn(exact, 32), quantize_rtn(exact.float(), 32)
    assert torch.equal(half.q, single.q)
    assert torch.equal(half.scales, single.scales)


def test_many_rows_are_rounded_as_few_are() -> None:
    exact = weight(1100, 64)  # more than are worked on at once
    whole = quantize_rtn(exact, 32)
    assert torch.equal(whole.q[:, 900:], quantize_rtn(exact[900:], 32).q)
    assert torch.equal(whole.scales[:, 900:], quantize_rtn(exact[900:], 32).scales)


def test_weights_on_a_grid_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (64, 16), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (2, 16), generator=generator, dtype=torch.uint8)
    # Both ends of the range occur in every group, so the grid is found again exactly.
    q[::32], q[1::32] = 0, 15
    given = Int4Matrix(q, zeros, torch.full((2, 16), 0.25).half())
    again = quantize_rtn(given.dequantize(), 32)
    assert torch.equal(again.q, given.q)
    assert torch.equal(again.zeros, given.zeros)
    assert torch.equal(again.scales, given.scales)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_group(value: float, symmetric: bool) -> None:
    rounded = to_dense(quantize_rtn(torch.full((8, 32), value), 32, symmetric))
    # Symmetric grids reach 7.5 scales, half a scale from the next level.
    torch.testing.assert_close(
        rounded, torch.full((8, 32), value), rtol=1 / 15 + 1e-3 if symmetric else 1e-3, atol=0
    )


def test_small_groups_are_rounded_as_well_as_others() -> None:
    """Scales below float16's normal numbers lose only their own last bits."""
    exact = weight(8, 64)
    rounded = to_dense(quantize_rtn(exact * 1e-4, 64))
    assert float(quantize_rtn(exact * 1e-4, 64).scales.max()) < 2.0**-14
    expected = float((to_dense(quantize_rtn(exact, 64)) - exact).norm())
    assert float((rounded * 1e4 - exact).norm()) < 1.1 * expected
    tiny = quantize_rtn(exact * 1e-9, 64)
    assert float(tiny.scales.min()) == MIN_SCALE
    assert bool((to_dense(tiny) == 0).all())


def test_a_group_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(ConfigError, match="group_size 32 does not divide the 40 inputs"):
        quantize_rtn(torch.zeros(8, 40), 32)
    with pytest.raises(ConfigError, match="group_size 0"):
        quantize_rtn(torch.zeros(8, 40), 0)


def test_dense_follows_the_definition_with_an_order_of_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = Int4Matrix(
        torch.randint(0, 16, (64, 8), generator=generator, dtype=torch.uint8),
        torch.randint(0, 16, (4, 8), generator=generator, dtype=torch.uint8),
        torch.rand(4, 8, generator=generator).half(),
        torch.randperm(64, generator=generator),
    )
    np.testing.assert_allclose(to_dense(matrix).double().numpy(), values(matrix), rtol=1e-6)
    parts = split_outputs(matrix, {"k": 3, "v": 5})
    joined = torch.cat([to_dense(part) for part in parts.values()])
    assert torch.equal(joined, to_dense(matrix))
    assert to_dense(parts["k"]).shape == (3, 64)


def test_relative_error_is_that_of_the_outputs() -> None:
    exact, x = weight(700, 640), inputs(640)  # more than a block of rows and of columns
    rounded = to_dense(quantize_rtn(exact, 64))
    expected = loss(rounded, exact, x) / loss(torch.zeros_like(exact), exact, x)
    found = relative_error(exact, rounded, Statistics.of(x).gram)
    assert found == pytest.approx(expected, rel=1e-4)
    assert relative_error(exact, rounded, torch.zeros(640, 640)) == 0.0


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_a_layer_with_and_without_calibration(family: str) -> None:
    case, plain = tiny_layer(family), tiny_layer(family)
    method = Rtn(group_size=8, symmetric=True)
    result = method.quantize_layer(case.layer, case.calibration)
    without = method.quantize_layer(plain.layer)
    assert set(result.linears) == set(ROLES) == set(result.errors)
    assert without.errors == {}
    assert set(result.biases) == set(case.layer.biases)
    for role in ROLES:
        assert torch.equal(to_dense(result.linears[role]), case.layer.weights[role])
        assert torch.equal(case.layer.weights[role], plain.layer.weights[role])
    assert all(0 < error < 0.05 for error in result.errors.values())
    torch.testing.assert_close(case.calibration.hidden, case.layer.forward(case.hidden))
