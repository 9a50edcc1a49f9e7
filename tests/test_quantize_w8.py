"""8-bit weights and SmoothQuant's migration, against numpy."""

from typing import Literal

import numpy as np
import pytest
import torch

from engine.quantize.layer import ROLES
from engine.quantize.smooth_quant import SmoothQuant
from engine.quantize.w8 import quantize_w8
from engine.weights.matrix import W8Matrix
from engine.weights.stored import to_dense
from tests.quantize_cases import tiny_layer, weight
from tests.tiny_models import FAMILIES


def test_int8_is_within_half_a_step_of_each_row() -> None:
    exact = weight(20, 64) * torch.logspace(-3, 3, 20).unsqueeze(1)
    matrix = quantize_w8(exact, "int8")
    largest = np.abs(exact.double().numpy()).max(1)
    np.testing.assert_allclose(matrix.scales.double().numpy(), largest / 127, rtol=1e-6)
    assert matrix.q.dtype == torch.int8
    assert int(matrix.q.min()) >= -127
    steps = (matrix.dequantize() - exact).abs() / matrix.scales.unsqueeze(1)
    assert float(steps.max()) <= 0.5 + 1e-4


def test_fp8_is_the_nearest_float_of_three_bits() -> None:
    exact = weight(20, 64)
    matrix = quantize_w8(exact, "fp8")
    assert matrix.q.dtype == torch.float8_e4m3fn
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    every = every[np.isfinite(every)]
    assert every.max() == 448
    scaled = exact.double().numpy() / matrix.scales.double().numpy()[:, None]
    nearest = np.abs(scaled[..., None] - every).min(-1)
    found = np.abs(scaled - matrix.q.double().numpy())
    np.testing.assert_allclose(found, nearest, atol=1e-4)
    assert bool((matrix.q.float().abs().amax(1) == 448).all())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_of_zeros_stay_zero(kind: Literal["int8", "fp8"]) -> None:
    exact = weight(4, 16)
    exact[2] = 0.0
    matrix = quantize_w8(exact, kind)
    assert bool((matrix.dequantize()[2] == 0).all())
    assert bool(torch.isfinite(matrix.scales).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_keeps_the_layers_function(family: str) -> None:
    case = tiny_layer(family, 1)
    exact = case.layer.forward(case.hidden)
    result = SmoothQuant().quantize_layer(case.layer, case.calibration)
    assert set(result.linears) == set(ROLES)
    assert all(isinstance(matrix, W8Matrix) for matrix in result.linears.values())
    for role in ROLES:
        torch.testing.assert_close(to_dense(result.linears[role]), case.layer.weights[role])
    error = (case.calibration.hidden - exact).norm() / (exact - case.hidden).norm()
    assert float(error) < 0.03
    assert all(0 < each < 1e-3 for each in result.errors.values())


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_the_largest_input_and_weight_of_a_channel_meet(alpha: float) -> None:
    case, smooth = tiny_layer("llama"), tiny_layer("llama")
    before = case.calibration.statistics(case.layer, "qkv").abs_max
    exact = torch.cat([case.layer.weights[role] for role in "qkv"]).abs().amax(0)
    SmoothQuant(alpha=alpha).quantize_layer(smooth.layer, smooth.calibration)
    scale = case.layer.norms["input_norm"] / smooth.layer.norms["input_norm"]
    expected = before.double() ** alpha / exact.double() ** (1 - alpha)
    torch.testing.assert_close(scale.double(), expected, rtol=1e-4, atol=0)
