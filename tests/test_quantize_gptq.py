"""GPTQ against a loop of one input at a time in float64 numpy, and its orders of inputs."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.quantize.feedback import inverse_factor
from engine.quantize.gptq import Gptq
from engine.quantize.layer import ROLES
from engine.quantize.rtn import quantize_rtn
from engine.quantize.statistics import Statistics
from engine.weights.matrix import Int4Matrix
from engine.weights.stored import to_dense
from tests.quantize_cases import inputs, loss, tiny_layer, values, weight

Array = np.ndarray[Any, np.dtype[np.float64]]


def grid_of(group: Array, symmetric: bool) -> tuple[Array, Array]:
    """scale and zero [N] of weights [N, g]."""
    if symmetric:
        scale = np.abs(group).max(1) / 7.5
        return scale.astype(np.float16).astype(np.float64), np.full(len(group), 8.0)
    low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float64)
    return scale, np.clip(np.round(-low / scale), 0, 15)


def naive_gptq(exact: Tensor, gram: Tensor, method: Gptq) -> Array:
    """Optimal brain quantisation in a fixed order; the inverse of what is left is kept itself."""
    w, h = exact.double().numpy().copy(), gram.double().numpy().copy()
    num_inputs = w.shape[1]
    size = num_inputs if method.group_size == -1 else method.group_size
    order = np.arange(num_inputs)
    if method.act_order:
        order = np.argsort(-np.diag(h), kind="stable")
    static = [grid_of(w[:, i : i + size], method.symmetric) for i in range(0, num_inputs, size)]
    h[np.diag_indices(num_inputs)] += method.damping * np.diag(h).mean()
    inverse = np.linalg.inv(h)
    rounded = np.zeros_like(w)
    for step, k in enumerate(order):
        if method.static_groups:
            scale, zero = static[k // size]
        elif step % size == 0:
            scale, zero = grid_of(w[:, order[step : step + size]], method.symmetric)
        level = np.clip(np.round(w[:, k] / scale) + zero, 0, 15)
        rounded[:, k] = (level - zero) * scale
        error = (w[:, k] - rounded[:, k]) / inverse[k, k]
        w -= np.outer(error, inverse[k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return rounded


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(96, 24), (320, 32), (288, 144), (160, -1)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_rounds_as_the_naive_loop_does(
    columns: int, group_size: int, static_groups: bool, act_order: bool, symmetric: bool
) -> None:
    exact, x = weight(12, columns), inputs(columns)
    method = Gptq(
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        static_groups=static_groups,
    )
    gram = Statistics.of(x).gram
    matrix = method.quantize(exact, gram)
    expected = naive_gptq(exact, gram, method)
    found = values(matrix)
    # A value at the border of two levels may fall on the other side in float32, and what comes
    # after it in its row then differs too: most rows agree to the last weight.
    agree = np.isclose(found, expected, atol=1e-5, rtol=1e-3).all(1)
    assert agree.mean() >= 0.5
    losses = [loss(torch.from_numpy(each), exact, x) for each in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert (matrix.input_order is not None) == (act_order and not static_groups)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_is_better_than_round_to_nearest(act_order: bool, symmetric: bool) -> None:
    exact, x = weight(64, 256), inputs(256)
    method = Gptq(group_size=64, symmetric=symmetric, act_order=act_order)
    found = loss(to_dense(method.quantize(exact, Statistics.of(x).gram)), exact, x)
    nearest = loss(to_dense(quantize_rtn(exact, 64, symmetric)), exact, x)
    assert found < (0.5 if act_order else 0.7) * nearest


def test_the_order_of_inputs_falls_with_their_sums_of_squares() -> None:
    x = inputs(64)
    matrix = Gptq(group_size=16, static_groups=False).quantize(weight(8, 64), Statistics.of(x).gram)
    assert matrix.input_order is not None
    assert sorted(matrix.input_order.tolist()) == list(range(64))
    sums = x.square().sum(0)[matrix.input_order]
    assert bool((sums[:-1] >= sums[1:]).all())


def test_rows_are_quantised_each_by_itself() -> None:
    exact, gram = weight(20, 64), Statistics.of(inputs(64)).gram
    for static_groups in (False, True):
        method = Gptq(group_size=16, static_groups=static_groups)
        parts = [method.quantize(part, gram) for part in (exact[:7], exact[7:])]
        whole = method.quantize(exact, gram)
        assert torch.equal(torch.cat([part.q for part in parts], 1), whole.q)
        assert torch.equal(torch.cat([part.scales for part in parts], 1), whole.scales)


def test_inputs_never_seen_are_rounded_by_themselves() -> None:
    exact, x = weight(8, 64), inputs(64)
    x[:, [3, 40]] = 0.0
    matrix = Gptq(group_size=16).quantize(exact, Statistics.of(x).gram)
    found, nearest = to_dense(matrix), to_dense(quantize_rtn(exact, 16))
    assert torch.equal(found[:, [3, 40]], nearest[:, [3, 40]])


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    gram = Statistics.of(inputs(50)).gram
    upper = inverse_factor(gram, 0.01).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(50)
    torch.testing.assert_close(
        upper.t() @ upper @ damped, torch.eye(50).double(), rtol=0, atol=1e-2
    )
    assert bool((upper.tril(-1) == 0).all())


def test_damping_is_raised_until_the_matrix_can_be_inverted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gram = torch.eye(4) - 0.05 * torch.eye(4)[[1, 0, 2, 3]]
    gram[2, 2] = 1.0
    gram[2, 3] = gram[3, 2] = 1.05  # eigenvalue -0.05
    with caplog.at_level(logging.WARNING):
        upper = inverse_factor(gram, 0.01)
    assert bool(torch.isfinite(upper).all())
    assert "not positive definite with damping 0.01: trying 0.1" in caplog.text
    with pytest.raises(CheckpointError, match="calibrate on more text"):
        inverse_factor(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01)


def test_fewer_tokens_than_inputs_are_enough() -> None:
    exact, x = weight(16, 128), inputs(128, tokens=20)
    found = loss(to_dense(Gptq(group_size=32).quantize(exact, Statistics.of(x).gram)), exact, x)
    assert found < 0.5 * loss(to_dense(quantize_rtn(exact, 32)), exact, x)


@pytest.mark.parametrize("static_groups", [False, True])
def test_a_layer(static_groups: bool) -> None:
    case = tiny_layer("qwen3")
    method = Gptq(group_size=8, static_groups=static_groups)
    result = method.quantize_layer(case.layer, case.calibration)
    assert set(result.linears) == set(result.errors) == set(ROLES)
    for role, matrix in result.linears.items():
        assert isinstance(matrix, Int4Matrix)
        assert torch.equal(to_dense(matrix), case.layer.weights[role])
        assert matrix.shape == tuple(case.layer.weights[role].shape)
    torch.testing.assert_close(case.calibration.hidden, case.layer.forward(case.hidden))
