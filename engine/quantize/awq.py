"""AWQ: activation-aware scales of the input channels, and clipped ranges (arXiv 2306.00978).

Channels with large inputs get larger weights, which rounding then hurts less. The scale is
searched on a grid by the error of the stage's outputs, from the Gram matrix of its inputs; scale 1,
which is round to nearest, is always among the candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantize.clip import clipped_grid
from engine.quantize.fold import Fold
from engine.quantize.grid import ROWS, Grid, in_groups, round_rows
from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.method import LayerPass, LayerResult, output_energy
from engine.quantize.rtn import quantize_rtn
from engine.quantize.statistics import Calibration, Statistics
from engine.weights.matrix import Int4Matrix

GRID_SIZE = 20
FIXED_RATIO = 0.5  # without a search, as LMDeploy has it
SEARCH_ROWS = 512  # of each linear, to try all scales on
MIN_SIZE = 1e-4  # of a candidate scale, before it is normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """`group_size` -1 means one group of all inputs.

    `clip` is for q and k too, which AutoAWQ leaves whole: by their own Gram matrix it takes the
    demo model's KL divergence from 0.064 to 0.050 at groups of 128, from 0.058 to 0.047 at 64.
    """

    group_size: int = 128
    symmetric: bool = False
    search_scale: bool = True
    clip: bool = True
    skip: tuple[str, ...] = ()

    def quantize_layer(self, layer: DenseLayer, calibration: Calibration) -> LayerResult:
        progress = LayerPass(layer, self.skip)
        for stage in STAGES:
            statistics, weights = calibration.statistics(layer, stage), progress.weights(stage)
            fold = Fold.of(progress, stage)
            if fold is not None:
                scale = self.best_scale(weights, statistics, fold)
                weights, statistics = fold.move(scale, weights, statistics)
            matrices = {role: self.quantize(weight, statistics) for role, weight in weights.items()}
            progress.replace(weights, matrices, statistics)
        calibration.advance(layer)
        return progress.result()

    def quantize(self, weight: Tensor, statistics: Statistics) -> Int4Matrix:
        """A scaled weight [N, K], or some of its rows: each is quantised by itself."""
        if not self.clip:
            return quantize_rtn(weight, self.group_size, self.symmetric)
        return round_rows(
            weight,
            self.group_size,
            lambda groups: clipped_grid(groups, statistics.gram, self.symmetric),
        )

    def best_scale(
        self, weights: Mapping[str, Tensor], statistics: Statistics, fold: Fold
    ) -> Tensor:
        """The realisable scale [C] whose outputs lose least, each linear's by its own energy."""
        sizes = [weight_sizes(weight, self.group_size) for weight in weights.values()]
        num_rows = sum(weight.shape[0] for weight in weights.values())
        inputs = fold.shared_mean(statistics.abs_mean)
        mean = fold.shared_mean(torch.stack(sizes).sum(0) / num_rows)
        if not self.search_scale:
            return fold.realisable(_power_scale(inputs, mean, FIXED_RATIO))
        scales = [fold.realisable(scale) for scale in candidate_scales(inputs, mean)]
        some = [some_rows(weight) for weight in weights.values()]
        best = scales[int(self._losses(some, statistics, fold, scales).argmin())]
        # Some rows chose it; by all of them it must be no worse than round to nearest.
        finalists = [scales[0], best]
        losses = self._losses(list(weights.values()), statistics, fold, finalists)
        return finalists[int(losses.argmin())]

    def _losses(
        self, weights: list[Tensor], statistics: Statistics, fold: Fold, scales: list[Tensor]
    ) -> Tensor:
        """Of each scale [C], summed over the linears, of each relative to what it puts out."""
        channels = [fold.expand(scale) for scale in scales]
        total = torch.zeros(len(scales), device=channels[0].device)
        for weight in weights:
            losses = self.losses(weight, statistics.gram, channels)
            total += losses / output_energy(weight, statistics.gram).sum().clamp(min=1e-30)
        return total

    def losses(self, weight: Tensor, gram: Tensor, scales: list[Tensor]) -> Tensor:
        """Of all rows [N, K] under each scale [K]."""
        return scale_losses(weight, gram, scales, self.group_size, self.symmetric)


def candidate_scales(inputs: Tensor, weights: Tensor) -> list[Tensor]:
    """Scales [C] to try, from the mean sizes [C] of inputs and weights; scale 1 comes first.

    inputs^a / weights^(1 - a) for a = 0, 1/20, …, 19/20 as in AutoAWQ.
    """
    ones = torch.ones_like(inputs)
    return [ones] + [_power_scale(inputs, weights, i / GRID_SIZE) for i in range(GRID_SIZE)]


def some_rows(weight: Tensor) -> Tensor:
    """SEARCH_ROWS rows by chance, the same each time; all where there are fewer."""
    chance = torch.Generator().manual_seed(0)
    chosen = torch.randperm(weight.shape[0], generator=chance)[:SEARCH_ROWS]
    return weight[chosen.to(weight.device)]


def weight_sizes(rows: Tensor, group_size: int) -> Tensor:
    """The sum over rows [N, K] of |w| relative to the largest of its group, [K]."""
    sizes = in_groups(rows, group_size).abs()
    return (sizes / sizes.amax(-1, keepdim=True).clamp(min=1e-12)).sum(0).flatten()


def scale_losses(
    rows: Tensor, gram: Tensor, scales: Sequence[Tensor], group_size: int, symmetric: bool
) -> Tensor:
    """The squared error of the outputs of float32 rows [N, K] under each scale [K], summed."""
    losses = torch.zeros(len(scales), device=rows.device)
    for part in torch.split(rows, ROWS):
        for i, scale in enumerate(scales):
            groups = in_groups(part * scale, group_size)
            nearest = Grid.spanning(groups, symmetric).nearest(groups).flatten(1)
            losses[i] += output_energy(nearest.div_(scale).sub_(part), gram).sum()
    return losses


def _power_scale(inputs: Tensor, weights: Tensor, ratio: float) -> Tensor:
    """Its largest and smallest values are as far from 1; inputs never seen count as usual ones."""
    seen = inputs > 0
    usual = inputs[seen].mean() if bool(seen.any()) else torch.ones_like(inputs[0])
    inputs = torch.where(seen, inputs, usual)
    scale = inputs**ratio / weights.clamp(min=MIN_SIZE) ** (1 - ratio)
    scale = scale.clamp(min=MIN_SIZE)
    return scale / (scale.amax() * scale.amin()).sqrt()
