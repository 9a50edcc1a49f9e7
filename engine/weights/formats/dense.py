"""Dense weights: `weight` [N, K] in bf16, fp16 or fp32."""

from dataclasses import dataclass

from engine.weights.checkpoint import Checkpoint, ExpectedTensor
from engine.weights.formats.weight_format import Part
from engine.weights.matrix import Matrix


@dataclass(frozen=True, slots=True)
class DenseFormat:
    def check(self, module: str, out_features: int, in_features: int) -> None:
        """Every size will do."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return {"weight": ExpectedTensor((out_features, in_features))}

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return {}

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        return checkpoint.read_finite(f"{part.module}.weight", part.rows, part.inputs)

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        return None
