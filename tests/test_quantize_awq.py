"""AWQ: folding changes nothing, losses are those of samples, and it beats round to nearest."""

from dataclasses import replace

import pytest
import torch

from engine.quantize import awq
from engine.quantize.awq import Awq, candidate_scales, scale_losses
from engine.quantize.clip import SHRINKS, clipped_grid, diagonal_blocks
from engine.quantize.fold import Fold
from engine.quantize.grid import Grid, in_groups
from engine.quantize.layer import ROLES, STAGES
from engine.quantize.rtn import Rtn, quantize_rtn
from engine.quantize.statistics import Statistics
from engine.weights.stored import to_dense
from tests.quantize_cases import inputs, loss, statistics, tiny_layer, weight
from tests.tiny_models import FAMILIES

BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("family", "config"), [*((family, {}) for family in FAMILIES), ("llama", BIASES)]
)
def test_folding_alone_leaves_the_layer_as_it_was(family: str, config: dict[str, bool]) -> None:
    case = tiny_layer(family, **config)
    layer = case.layer
    before = layer.forward(case.hidden)
    generator = torch.Generator().manual_seed(3)
    for stage, roles in STAGES.items():
        fold = Fold(layer, stage, {})
        free = fold.shared_mean(torch.ones(layer.weights[roles[0]].shape[1]))
        scale = fold.realisable(torch.rand(free.shape, generator=generator) * 3 + 0.3)
        fold.apply(scale)
        for role in roles:
            layer.weights[role] = layer.weights[role] * fold.expand(scale)
    torch.testing.assert_close(layer.forward(case.hidden), before, rtol=1e-4, atol=1e-4)


def test_heads_that_share_a_kv_head_share_their_scales() -> None:
    case = tiny_layer("llama")  # 4 heads on 2 kv heads, of 12
    fold = Fold(case.layer, "o", {})
    each = torch.arange(48.0)
    assert fold.shared_max(each).tolist() == [*range(12, 24), *range(36, 48)]
    assert fold.shared_mean(each).tolist() == [*range(6, 18), *range(30, 42)]
    expanded = fold.expand(torch.arange(24.0)).view(4, 12)
    assert torch.equal(expanded[0], expanded[1])
    assert expanded[2:].tolist() == [list(range(12, 24))] * 2


def test_a_scale_takes_up_what_the_norm_loses_in_bfloat16() -> None:
    case = tiny_layer("llama")
    layer = replace(case.layer, spec=replace(case.layer.spec, dtype="bfloat16"))
    layer.norms["input_norm"] = layer.norms["input_norm"].bfloat16().float()
    layer.norms["input_norm"][3] = 0.0
    norm = layer.norms["input_norm"].clone()
    fold = Fold(layer, "qkv", {})
    wanted = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.5
    scale = fold.realisable(wanted)
    fold.apply(scale)
    stored = layer.norms["input_norm"]
    assert torch.equal(stored, stored.bfloat16().float())
    torch.testing.assert_close(stored * scale, norm, rtol=1e-6, atol=0)
    assert float(scale[3]) == 1.0
    torch.testing.assert_close(scale[norm != 0], wanted[norm != 0], rtol=2**-7, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_losses_of_candidates_are_those_of_the_outputs_on_samples(symmetric: bool) -> None:
    exact, x = weight(40, 128), inputs(128)
    scales = candidate_scales(x.abs().mean(0), exact.abs().mean(0))
    assert len(scales) == 21
    found = scale_losses(exact, Statistics.of(x).gram, scales, 32, symmetric)
    for scale, got in zip(scales, found.tolist(), strict=True):
        rounded = to_dense(quantize_rtn(exact * scale, 32, symmetric))
        assert got == pytest.approx(loss(rounded, exact * scale, x / scale), rel=1e-3)


def test_candidates_follow_the_paper() -> None:
    sizes, weights = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([0.5, 0.25, 0.5])
    scales = candidate_scales(sizes, weights)
    assert torch.equal(scales[0], torch.ones(3))
    expected = sizes.double() ** 0.5 / weights.double() ** 0.5
    expected /= (expected.max() * expected.min()).sqrt()
    torch.testing.assert_close(scales[1 + 10].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("group_size", [8, 16, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_is_better_than_round_to_nearest(group_size: int, symmetric: bool) -> None:
    exact, x = {"o": weight(64, 48)}, inputs(48)
    found = Statistics.of(x)
    method = Awq(group_size=group_size, symmetric=symmetric)
    scale = method.best_scale(exact, found, Fold(tiny_layer("qwen3").layer, "down", {}))
    scaled = exact["o"] * scale
    rounded = to_dense(method.quantize(scaled, found.scaled(1 / scale))) / scale
    whole = replace(method, clip=False)
    unclipped = to_dense(whole.quantize(scaled, found.scaled(1 / scale))) / scale
    nearest = loss(to_dense(quantize_rtn(exact["o"], group_size, symmetric)), exact["o"], x)
    assert loss(unclipped, exact["o"], x) <= nearest * (1 + 1e-5)
    assert loss(rounded, exact["o"], x) < 0.9 * nearest


def test_clipping_never_costs_a_row_anything() -> None:
    exact, x = weight(80, 128), inputs(128)
    gram = Statistics.of(x).gram
    groups = in_groups(exact, 32)
    full = Grid.spanning(groups, False).nearest(groups).flatten(1)
    clipped = clipped_grid(groups, gram, False).nearest(groups).flatten(1)
    losses = [
        (x.double() @ (each - exact).double().t()).square().sum(0) for each in (full, clipped)
    ]
    assert bool((losses[1] <= losses[0] * (1 + 1e-4)).all())
    assert float(losses[1].sum()) < 0.9 * float(losses[0].sum())


def test_the_clip_of_a_group_is_the_best_by_its_own_outputs() -> None:
    exact, x = weight(6, 32), inputs(32)
    grid = clipped_grid(exact.unsqueeze(1), Statistics.of(x).gram, True)
    for row in range(6):
        own = exact[row : row + 1]
        losses = []
        for shrink in SHRINKS:
            candidate = Grid.spanning(own.unsqueeze(1), True, shrink)
            losses.append(loss(candidate.nearest(own.unsqueeze(1)).flatten(1), own, x))
        rounded = Grid(grid.scales[row : row + 1], grid.zeros[row : row + 1])
        found = loss(rounded.nearest(own.unsqueeze(1)).flatten(1), own, x)
        assert found == pytest.approx(min(losses), rel=1e-3)


def test_diagonal_blocks() -> None:
    gram = statistics(12).gram
    blocks = diagonal_blocks(gram, 4)
    assert torch.equal(blocks[1], gram[4:8, 4:8])
    assert blocks.shape == (3, 4, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_loses_less_than_by_round_to_nearest(family: str) -> None:
    case, other = tiny_layer(family, 1), tiny_layer(family, 1)
    exact = case.layer.forward(case.hidden)
    result = Awq(group_size=8).quantize_layer(case.layer, case.calibration)
    Rtn(group_size=8).quantize_layer(other.layer, other.calibration)
    assert set(result.linears) == set(ROLES)
    for role in ROLES:
        torch.testing.assert_close(to_dense(result.linears[role]), case.layer.weights[role])
    found = case.calibration.hidden
    torch.testing.assert_close(case.layer.forward(case.hidden), found, rtol=1e-4, atol=1e-4)
    error = float((found - exact).norm() / (exact - case.hidden).norm())
    of_rtn = float((other.calibration.hidden - exact).norm() / (exact - case.hidden).norm())
    assert error < of_rtn


def test_without_a_search_the_ratio_is_one_half() -> None:
    case = tiny_layer("llama")
    found = case.calibration.statistics(case.layer, "down")
    exact = {"down": case.layer.weights["down"]}
    fold = Fold(case.layer, "down", {})
    scale = Awq(group_size=8, search_scale=False).best_scale(exact, found, fold)
    groups = exact["down"].abs().view(48, -1, 8)
    mean = (groups / groups.amax(-1, keepdim=True)).mean(0).flatten()
    expected = (found.abs_mean / mean).sqrt()
    torch.testing.assert_close(scale / scale[0], expected / expected[0], rtol=1e-4, atol=0)


def test_dead_inputs_zero_rows_and_groups_are_kept_harmless() -> None:
    case = tiny_layer("llama", 1)
    layer = case.layer
    layer.norms["post_attention_norm"][5] = 0.0  # an input that is never seen
    layer.weights["gate"][7] = 0.0
    layer.weights["v"][3] = 0.0
    layer.weights["down"][:, 8:16] = 0.0
    result = Awq(group_size=8).quantize_layer(layer, case.calibration)
    assert bool(torch.isfinite(case.calibration.hidden).all())
    assert bool((to_dense(result.linears["gate"])[7] == 0).all())
    assert bool((to_dense(result.linears["down"])[:, 8:16] == 0).all())
    assert float(layer.norms["post_attention_norm"][5]) == 0.0
    for matrix in result.linears.values():
        assert bool(torch.isfinite(to_dense(matrix)).all())


def test_a_search_on_some_rows_is_confirmed_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are looked at want a scale that harms the others: it is not taken."""
    x = inputs(32)
    exact = {"down": weight(40, 32)}
    monkeypatch.setattr(awq, "some_rows", lambda rows: rows[:1] * 0 + 1e-3)
    method = Awq(group_size=8)
    fold = Fold(tiny_layer("llama").layer, "down", {})
    found = Statistics.of(x)
    scale = method.best_scale(exact, found, fold)
    losses = scale_losses(exact["down"], found.gram, [torch.ones(32), scale], 8, False)
    assert float(losses[1]) <= float(losses[0])
