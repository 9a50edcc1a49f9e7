"""WeightFormat: what the reader of a checkpoint asks of a stored format, and Part: what it reads.

It knows no format, and nothing of which modules have which.
"""

from dataclasses import dataclass
from typing import Protocol

from engine.weights.checkpoint import Checkpoint, ExpectedTensor
from engine.weights.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs `rows` and inputs `inputs` of the linear `module` [out_features, in_features]."""

    module: str
    out_features: int
    in_features: int
    rows: slice
    inputs: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the part."""
        return self.rows.stop - self.rows.start, self.inputs.stop - self.inputs.start


class WeightFormat(Protocol):
    """Tensors' names are given as suffixes: "qweight" of "model.layers.0.mlp.up_proj.qweight"."""

    def check(self, module: str, out_features: int, in_features: int) -> None:
        """CheckpointError for sizes that the format cannot hold."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        """Those that must be there, by suffix; the bias is not among them."""

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        """Those that may be there."""

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        """The part; CheckpointError names the tensor whose values cannot be right."""

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        """K and group size of the Int4Matrix that `read` gives, without reading.

        None when it gives another form. Where only the values say how many inputs of a group are
        among the part's, the K that is likely.
        """
