"""Pruning keeps its pattern, and what it keeps is the better the more it knows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.quantize.layer import ROLES
from engine.quantize.prune import Pattern, Prune, prune_sparsegpt, prune_wanda
from engine.quantize.statistics import Statistics
from tests.quantize_cases import inputs, loss, tiny_layer, weight


def magnitude(exact: Tensor, pattern: Pattern) -> Tensor:
    groups = exact.numpy().reshape(exact.shape[0], -1, pattern.of).copy()
    drop = np.argsort(np.abs(groups), axis=-1)[..., : pattern.of - pattern.keep]
    np.put_along_axis(groups, drop, 0.0, axis=-1)
    return torch.from_numpy(groups.reshape(exact.shape))


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:3"])
def test_the_pattern_holds_and_knowing_more_costs_less(text: str) -> None:
    pattern = Pattern.parse(text)
    exact, x = weight(48, 192), inputs(192)
    gram = Statistics.of(x).gram
    wanda = prune_wanda(exact, gram, pattern)
    sparse = prune_sparsegpt(exact, gram, pattern, 0.01)
    for pruned in (wanda, sparse):
        kept = (pruned != 0).view(48, -1, pattern.of).sum(-1)
        assert bool((kept == pattern.keep).all())
    assert torch.equal(wanda[wanda != 0], exact[wanda != 0])
    losses = [loss(each, exact, x) for each in (sparse, wanda, magnitude(exact, pattern))]
    assert losses[0] < 0.9 * losses[1]
    assert losses[1] < 0.8 * losses[2]


def test_wanda_keeps_the_largest_products_of_weight_and_input() -> None:
    exact, x = weight(10, 16), inputs(16)
    found = prune_wanda(exact, Statistics.of(x).gram, Pattern(2, 4)).double().numpy()
    scores = np.abs(exact.double().numpy()) * np.linalg.norm(x.double().numpy(), axis=0)
    for row in range(10):
        for first in range(0, 16, 4):
            best = set(first + np.argsort(scores[row, first : first + 4])[2:])
            assert set(first + np.flatnonzero(found[row, first : first + 4])) == best


def test_sparsegpt_is_the_naive_loop() -> None:
    """One input at a time with the inverse updated itself, in float64."""
    exact, x = weight(6, 40), inputs(40)
    gram = Statistics.of(x).gram
    w, h = exact.double().numpy().copy(), gram.double().numpy().copy()
    h[np.diag_indices(40)] += 0.01 * np.diag(h).mean()
    inverse = np.linalg.inv(h)
    # The diagonals that a mask looks at are those at each input's own turn.
    left, turns = inverse.copy(), []
    for k in range(40):
        turns.append(left[k, k])
        left -= np.outer(left[:, k], left[k]) / left[k, k]
    keep = np.zeros(w.shape, dtype=bool)
    for k in range(40):
        if k % 4 == 0:
            scores = w[:, k : k + 4] ** 2 / np.array(turns[k : k + 4])
            np.put_along_axis(keep[:, k : k + 4], np.argsort(scores, 1)[:, 2:], True, axis=1)
        error = np.where(keep[:, k], 0.0, w[:, k]) / inverse[k, k]
        w -= np.outer(error, inverse[k])
        w[:, k] *= keep[:, k]
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    found = prune_sparsegpt(exact, gram, Pattern(2, 4), 0.01)
    np.testing.assert_allclose(found.double().numpy(), w, atol=2e-3)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_equal_and_zero_weights_keep_no_more_than_the_pattern(method: str) -> None:
    pruned = Prune(method="wanda" if method == "wanda" else "sparsegpt").prune(
        torch.ones(4, 16), torch.eye(16)
    )
    assert bool(((pruned != 0).view(4, 4, 4).sum(-1) == 2).all())
    zeros = Prune().prune(torch.zeros(4, 16), torch.eye(16))
    assert bool((zeros == 0).all())


def test_a_layer() -> None:
    case = tiny_layer("internlm2")
    result = Prune(method="wanda").quantize_layer(case.layer, case.calibration)
    assert set(result.linears) == set(result.errors) == set(ROLES)
    for role, pruned in result.linears.items():
        assert isinstance(pruned, Tensor)
        assert bool(((pruned != 0).view(pruned.shape[0], -1, 4).sum(-1) == 2).all())
        assert torch.equal(pruned, case.layer.weights[role])
    torch.testing.assert_close(case.calibration.hidden, case.layer.forward(case.hidden))


@pytest.mark.parametrize("text", ["2", "2:4:8", "a:4", "4:4", "0:4", "-1:4", "5:4"])
def test_patterns_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="keeps n of every m"):
        Pattern.parse(text)


def test_inputs_that_a_pattern_does_not_divide_are_named() -> None:
    case = tiny_layer("llama")
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj has 48 inputs, which pattern 2:5"):
        Prune(pattern=Pattern(2, 5)).quantize_layer(case.layer, case.calibration)
