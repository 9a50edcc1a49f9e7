"""SmoothQuant: outliers of the inputs are moved into the weights, which are 8-bit (2211.10438).

Each channel's largest input and largest weight are brought together: with alpha 0.5 to their
geometric mean. Inputs then suit 8 bits too; the errors reported are of the weights alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantize.fold import Fold
from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.method import LayerPass, LayerResult
from engine.quantize.statistics import Calibration, Statistics
from engine.quantize.w8 import W8Type, quantize_w8

MIN_LARGEST = 1e-5  # of a channel that is never used


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant:
    """`alpha` is the part of the inputs' range that moves: 0 none of it, 1 all."""

    alpha: float = 0.5
    kind: W8Type = "int8"
    skip: tuple[str, ...] = ()

    def quantize_layer(self, layer: DenseLayer, calibration: Calibration) -> LayerResult:
        progress = LayerPass(layer, self.skip)
        for stage in STAGES:
            statistics, weights = calibration.statistics(layer, stage), progress.weights(stage)
            fold = Fold.of(progress, stage)
            if fold is not None:
                scale = self._scale(weights, statistics, fold)
                weights, statistics = fold.move(scale, weights, statistics)
            matrices = {role: quantize_w8(weight, self.kind) for role, weight in weights.items()}
            progress.replace(weights, matrices, statistics)
        calibration.advance(layer)
        return progress.result()

    def _scale(self, weights: Mapping[str, Tensor], statistics: Statistics, fold: Fold) -> Tensor:
        """[C]."""
        largest = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
        inputs = fold.shared_max(statistics.abs_max).clamp(min=MIN_LARGEST)
        outputs = fold.shared_max(largest).clamp(min=MIN_LARGEST)
        return fold.realisable(inputs**self.alpha / outputs ** (1 - self.alpha))
