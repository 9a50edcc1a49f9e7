"""What a quantisation method is: it takes a dense layer and gives its linears quantised.

Also what all methods share: replacing a layer's linears one stage after the other, and the
error of that. Each method's own module has its loop over the stages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.models.spec import DecoderSpec
from engine.quantize.grid import ROWS
from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.statistics import Calibration, Statistics
from engine.weights.matrix import Int4Matrix, Matrix
from engine.weights.stored import to_dense

COLUMNS = 512  # of a Gram matrix


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A layer's linears as they are to be stored, and what went with them.

    `errors` are squared and relative: with D the change of a weight W and H the Gram matrix of its
    inputs, tr(D H Dᵀ) / tr(W H Wᵀ). They are empty without a calibration, and lack what a method
    was told to skip.
    """

    linears: dict[str, Matrix]  # by role
    biases: dict[str, Tensor]  # by role, in the checkpoint's dtype
    norms: dict[str, Tensor]  # by name as DenseLayer.norms, in the checkpoint's dtype
    errors: dict[str, float]  # by role


class Method(Protocol):
    """Settings, and what they do to a layer."""

    def quantize_layer(self, layer: DenseLayer, calibration: Calibration) -> LayerResult:
        """Quantise the layer and take the calibration's samples through what came of it."""
        ...


class LayerPass:
    """One layer on its way through a method: its linears so far and their errors.

    Linears with one of `skip` in their names stay as they are.
    """

    def __init__(self, layer: DenseLayer, skip: tuple[str, ...]) -> None:
        self.layer = layer
        self.linears: dict[str, Matrix] = {}
        self.errors: dict[str, float] = {}
        self._skip = skip

    def skips(self, role: str) -> bool:
        return any(part in self.layer.module(role) for part in self._skip)

    def weights(self, stage: str) -> dict[str, Tensor]:
        """float32 [N, K] of the stage's linears that are to be quantised, by role."""
        roles = (role for role in STAGES[stage] if not self.skips(role))
        return {role: self.layer.weights[role].float() for role in roles}

    def replace(
        self,
        weights: Mapping[str, Tensor],
        matrices: Mapping[str, Matrix],
        statistics: Statistics | None,
    ) -> None:
        """The layer computes with `matrices` from now on, instead of with `weights` [N, K]."""
        for role, matrix in matrices.items():
            rounded = to_dense(matrix).float()
            self.linears[role] = matrix
            self.layer.weights[role] = rounded.to(self.layer.dtype)
            if statistics is not None:
                self.errors[role] = relative_error(weights[role], rounded, statistics.gram)

    def result(self) -> LayerResult:
        dtype = stored_dtype(self.layer.spec)
        kept = {role: weight.to(dtype) for role, weight in self.layer.weights.items()}
        return LayerResult(
            linears=kept | self.linears,
            biases={role: bias.to(dtype) for role, bias in self.layer.biases.items()},
            norms={name: norm.to(dtype) for name, norm in self.layer.norms.items()},
            errors=self.errors,
        )


def stored_dtype(spec: DecoderSpec) -> torch.dtype:
    """That of the checkpoint's dense tensors."""
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def split_outputs(matrix: Int4Matrix, sizes: Mapping[str, int]) -> dict[str, Matrix]:
    """Linears that were quantised as one, by role, from the number of outputs of each."""
    found: dict[str, Matrix] = {}
    first = 0
    for role, size in sizes.items():
        own = slice(first, first + size)
        found[role] = Int4Matrix(
            matrix.q[:, own].contiguous(),
            matrix.zeros[:, own].contiguous(),
            matrix.scales[:, own].contiguous(),
            matrix.input_order,
        )
        first += size
    return found


def output_energy(rows: Tensor, gram: Tensor) -> Tensor:
    """The diagonal of rows H rowsᵀ: each row's [N, K] outputs over all samples, squared; [N]."""
    parts = [_energy(part, gram) for part in torch.split(rows, ROWS)]
    return torch.cat(parts)


def relative_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ) with D = rounded - weight, both [N, K]; 0 when nothing is put out."""
    lost, whole = 0.0, 0.0
    for before, after in zip(torch.split(weight, ROWS), torch.split(rounded, ROWS), strict=True):
        wide = before.float()
        lost += float(output_energy(after - wide, gram).sum(dtype=torch.float64))
        whole += float(output_energy(wide, gram).sum(dtype=torch.float64))
    return max(lost, 0.0) / whole if whole > 0 else 0.0


def _energy(rows: Tensor, gram: Tensor) -> Tensor:
    """H is symmetric: of the blocks on either side of its diagonal one is multiplied, for both."""
    total = torch.zeros(rows.shape[0], device=rows.device)
    for start in range(0, gram.shape[0], COLUMNS):
        own = slice(start, start + COLUMNS)
        product = rows[:, own] @ gram[own, own]
        product.addmm_(rows[:, :start], gram[:start, own], alpha=2)
        total += product.mul_(rows[:, own]).sum(1)
    return total
