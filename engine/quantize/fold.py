"""Fold: scaling a stage's input channels by what comes before them, so that nothing changes.

A linear of x computes W x = (W S)(S⁻¹ x). S goes into the weights that are quantised next, S⁻¹
into what makes x: the norm of qkv and gate_up, the rows of v for o (its channels are v's, of
each query head once), the rows of up for down.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.quantize.grid import MAX_SCALE, MIN_SCALE
from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.method import LayerPass, stored_dtype
from engine.quantize.statistics import Statistics
from engine.weights.matrix import Int4Matrix, Matrix, W8Matrix
from engine.weights.stored import to_dense

NORM_BEFORE = {"qkv": "input_norm", "gate_up": "post_attention_norm"}
LINEAR_BEFORE = {"o": "v", "down": "up"}


@dataclass(frozen=True, slots=True)
class Fold:
    """The free scales of one stage of a layer, whose linears so far are `linears`."""

    layer: DenseLayer
    stage: str
    linears: dict[str, Matrix]

    @classmethod
    def of(cls, progress: LayerPass, stage: str) -> "Fold | None":
        """None where a linear that is to stay as it is would be scaled."""
        before = [LINEAR_BEFORE[stage]] if stage in LINEAR_BEFORE else []
        if any(progress.skips(role) for role in (*STAGES[stage], *before)):
            return None
        return cls(progress.layer, stage, progress.linears)

    def shared_mean(self, values: Tensor) -> Tensor:
        """[K] -> one value per free scale [C]: the query heads of a kv head share theirs."""
        return self._by_kv_head(values).mean(1).flatten()

    def shared_max(self, values: Tensor) -> Tensor:
        return self._by_kv_head(values).amax(1).flatten()

    def expand(self, scale: Tensor) -> Tensor:
        """[C] -> [K]."""
        heads, copies, _ = self._shape
        return scale.view(heads, 1, -1).expand(-1, copies, -1).flatten()

    def realisable(self, scale: Tensor) -> Tensor:
        """The nearest scale [C] whose inverse can be stored: a norm is rounded to its dtype.

        What is rounded in the inverse goes into the scale, so that the fold stays exact.
        """
        if self.stage in NORM_BEFORE:
            norm = self.layer.norms[NORM_BEFORE[self.stage]].float()
            stored = (norm / scale).to(stored_dtype(self.layer.spec)).float()
            exact = norm / stored
            usable = torch.isfinite(exact) & (exact > 0)
            return torch.where(usable, exact, torch.ones_like(exact))
        before = self.linears.get(LINEAR_BEFORE[self.stage])
        if not isinstance(before, Int4Matrix):
            return scale
        scales = before.scales.float()
        return scale.clamp(min=scales.amax(0) / MAX_SCALE).clamp(max=scales.amin(0) / MIN_SCALE)

    def apply(self, scale: Tensor) -> None:
        """Divide what comes before by a realisable scale [C]; the stage's weights stay."""
        layer, dtype = self.layer, stored_dtype(self.layer.spec)
        if self.stage in NORM_BEFORE:
            name = NORM_BEFORE[self.stage]
            layer.norms[name] = (layer.norms[name].float() / scale).to(dtype).to(layer.dtype)
            return
        role = LINEAR_BEFORE[self.stage]
        if role in self.linears:
            self.linears[role] = scale_outputs(self.linears[role], 1 / scale)
            layer.weights[role] = to_dense(self.linears[role]).to(layer.dtype)
        else:
            layer.weights[role] = layer.weights[role] / scale.unsqueeze(1).to(layer.dtype)
        if role in layer.biases:
            bias = layer.biases[role].float() / scale
            layer.biases[role] = bias.to(dtype).to(layer.dtype)

    def move(
        self, scale: Tensor, weights: Mapping[str, Tensor], statistics: Statistics
    ) -> tuple[dict[str, Tensor], Statistics]:
        """Apply a realisable scale [C]; the stage's weights [N, K] and inputs under it."""
        self.apply(scale)
        channels = self.expand(scale)
        scaled = {role: weight * channels for role, weight in weights.items()}
        return scaled, statistics.scaled(1 / channels)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """kv heads, query heads of each, channels of a head; 1, 1, K where nothing is shared."""
        spec = self.layer.spec
        if self.stage != "o":
            return 1, 1, -1
        return spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim

    def _by_kv_head(self, values: Tensor) -> Tensor:
        return values.view(self._shape)


def scale_outputs(matrix: Matrix, factor: Tensor) -> Matrix:
    """Multiply the outputs by a positive factor [N]; quantised weights keep their levels."""
    if isinstance(matrix, Tensor):
        return (matrix * factor.unsqueeze(1)).to(matrix.dtype)
    if isinstance(matrix, W8Matrix):
        return replace(matrix, scales=matrix.scales * factor)
    return replace(matrix, scales=(matrix.scales.float() * factor).to(matrix.scales.dtype))
