"""Linears as they are stored, and reading parts of them side by side, as one matrix."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint, ExpectedTensor
from engine.weights.formats.groups import side_by_side
from engine.weights.formats.weight_format import Part, WeightFormat
from engine.weights.matrix import Int4Matrix, Matrix, W8Matrix

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """One linear of a checkpoint; CheckpointError when its format cannot hold its sizes."""

    module: str
    out_features: int
    in_features: int
    bias: bool
    format: WeightFormat

    def __post_init__(self) -> None:
        self.format.check(self.module, self.out_features, self.in_features)

    def tensors(self) -> dict[str, ExpectedTensor]:
        """Its tensors by name."""
        found = {f"{self.module}.bias": ExpectedTensor((self.out_features,))} if self.bias else {}
        return found | self._named(self.format.tensors(self.out_features, self.in_features))

    def optional(self) -> dict[str, ExpectedTensor]:
        """Those that may be there, by name."""
        return self._named(self.format.optional(self.out_features, self.in_features))

    def _named(self, tensors: dict[str, ExpectedTensor]) -> dict[str, ExpectedTensor]:
        return {f"{self.module}.{suffix}": tensor for suffix, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """Output features [start, stop) of a stored linear."""

    stored: StoredLinear
    start: int
    stop: int

    def part(self, inputs: slice) -> Part:
        stored, rows = self.stored, slice(self.start, self.stop)
        return Part(stored.module, stored.out_features, stored.in_features, rows, inputs)


def read_bias(checkpoint: Checkpoint, pieces: list[Piece]) -> Tensor | None:
    """The pieces' biases end to end; None when they have none."""
    parts = []
    for piece in pieces:
        name = f"{piece.stored.module}.bias"
        if not piece.stored.bias and name not in checkpoint.tensors:
            continue
        part = checkpoint.read_finite(name, slice(piece.start, piece.stop))
        if piece.stored.bias:
            parts.append(part)
        elif part.any():
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {name} is not zero, but this architecture has no "
                "such bias; set attention_bias or mlp_bias in config.json if the model has"
            )
    return torch.cat(parts) if parts else None


def read_weight(
    checkpoint: Checkpoint, pieces: list[Piece], inputs: slice, dtype: torch.dtype
) -> Matrix:
    """The pieces side by side along N, restricted to the input features `inputs`.

    Pieces of one form keep it, int8 with int8 and int4 with int4 whose inputs are in one order;
    others together are dense, [N, K] of `dtype`.
    """
    parts = [piece.stored.format.read(checkpoint, piece.part(inputs)) for piece in pieces]
    int4 = [part for part in parts if isinstance(part, Int4Matrix)]
    if len(int4) == len(parts):
        matrix = side_by_side(int4)
        if matrix is not None:
            return matrix
        _warn_of_orders(pieces, dtype)
    int8 = [part for part in parts if isinstance(part, W8Matrix) and part.q.dtype == torch.int8]
    if len(int8) == len(parts):
        return W8Matrix(torch.cat([m.q for m in int8]), torch.cat([m.scales for m in int8]))
    dense = [to_dense(part).to(dtype) for part in parts]
    return torch.cat(dense) if len(dense) > 1 else dense[0]


def read_dense(checkpoint: Checkpoint, linear: StoredLinear) -> Tensor:
    """The whole linear, dequantised: float32 [N, K]."""
    whole = Piece(linear, 0, linear.out_features).part(slice(0, linear.in_features))
    return to_dense(linear.format.read(checkpoint, whole)).float()


def to_dense(matrix: Matrix) -> Tensor:
    """[N, K]; dequantised ones in float32."""
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize()


def _warn_of_orders(pieces: list[Piece], dtype: torch.dtype) -> None:
    logger.warning(
        "%s share their input but have act-orders of their own, so they are kept dequantised: "
        "%d times the memory of int4",
        " and ".join(dict.fromkeys(piece.stored.module for piece in pieces)),
        2 * dtype.itemsize,
    )
