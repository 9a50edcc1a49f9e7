"""Round to nearest: 4 bits per weight in groups, from the weights alone."""

from dataclasses import dataclass

from torch import Tensor

from engine.quantize.grid import Grid, round_rows
from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.method import LayerPass, LayerResult
from engine.quantize.statistics import Calibration
from engine.weights.matrix import Int4Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Rtn:
    """`group_size` -1 means one group of all inputs."""

    group_size: int = 128
    symmetric: bool = False
    skip: tuple[str, ...] = ()

    def quantize_layer(
        self, layer: DenseLayer, calibration: Calibration | None = None
    ) -> LayerResult:
        """A calibration is for the errors only."""
        progress = LayerPass(layer, self.skip)
        for stage in STAGES:
            statistics = None
            if calibration is not None:
                statistics = calibration.statistics(layer, stage)
            weights = progress.weights(stage)
            rounded = {
                role: quantize_rtn(weight, self.group_size, self.symmetric)
                for role, weight in weights.items()
            }
            progress.replace(weights, rounded, statistics)
        if calibration is not None:
            calibration.advance(layer)
        return progress.result()


def quantize_rtn(weight: Tensor, group_size: int, symmetric: bool = False) -> Int4Matrix:
    """Round a weight [N, K] to the nearest of each group's 16 values, over the group's range."""
    return round_rows(weight, group_size, lambda groups: Grid.spanning(groups, symmetric))
