"""Int8: 8 bits per weight with one scale per output, from the weights alone."""

from dataclasses import dataclass

from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.method import LayerPass, LayerResult
from engine.quantize.statistics import Calibration
from engine.quantize.w8 import quantize_w8


@dataclass(frozen=True, slots=True)
class Int8:
    """Nothing is moved between inputs and weights, unlike in SmoothQuant."""

    skip: tuple[str, ...] = ()

    def quantize_layer(
        self, layer: DenseLayer, calibration: Calibration | None = None
    ) -> LayerResult:
        """A calibration is for the errors only."""
        progress = LayerPass(layer, self.skip)
        for stage in STAGES:
            statistics = None if calibration is None else calibration.statistics(layer, stage)
            weights = progress.weights(stage)
            matrices = {role: quantize_w8(weight, "int8") for role, weight in weights.items()}
            progress.replace(weights, matrices, statistics)
        if calibration is not None:
            calibration.advance(layer)
        return progress.result()
