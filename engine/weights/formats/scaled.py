"""8-bit values stored as they are, int8 or fp8 e4m3 [N, K]: W8A8 and W8A16 checkpoints.

    scale [N, 1]                        one per output ("channel")
    scale [1]                           one for all ("tensor")
    scale [ceil(N / a), ceil(K / b)]    one per block of a outputs and b inputs
    weight_zero_point, as scale         asymmetric int8 alone; older tools write zeros for symmetric

w[n, k] = (q - zero_point) * scale. DeepSeek-V3 named the blocks' scale `weight_scale_inv`, although
it multiplies. Activations keep 16 bits: W8A8's rounding of them is left out, so that `input_scale`
has no use. Symmetric int8 with a scale per output multiplies int8 rows where int8_activations
allows it; everything else is dequantised on reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint, ExpectedTensor
from engine.weights.formats.weight_format import Part
from engine.weights.matrix import Matrix, W8Matrix

DTYPES: Mapping[str, tuple[str, ...]] = {"int8": ("I8",), "fp8": ("F8_E4M3",)}


@dataclass(frozen=True, slots=True)
class ScaledFormat:
    values: Literal["int8", "fp8"]
    scale: str  # the suffix of its tensor
    per: Literal["channel", "tensor", "block"]
    block: tuple[int, int] = (1, 1)  # outputs, inputs
    symmetric: bool = True

    def check(self, module: str, out_features: int, in_features: int) -> None:
        """Every size will do: blocks may be cut at the edges."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return {
            "weight": ExpectedTensor((out_features, in_features), DTYPES[self.values]),
            self.scale: ExpectedTensor(self._scale_shape(out_features, in_features)),
            **({} if self.symmetric else self._zero_point(out_features, in_features)),
        }

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return self._zero_point(out_features, in_features)

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        name = f"{part.module}.weight"
        read = checkpoint.read if self.values == "int8" else checkpoint.read_finite
        q = read(name, part.rows, part.inputs)
        zero_point = self._read_zero_point(checkpoint, part)
        scale = self._expanded(checkpoint.read_finite(f"{part.module}.{self.scale}"), part)
        if self.per == "block":
            return q.float() * scale
        if zero_point is None:
            return W8Matrix(q, scale.expand(len(q), 1).squeeze(1).float().contiguous())
        return (q.float() - zero_point.float()) * scale

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        return None

    def _read_zero_point(self, checkpoint: Checkpoint, part: Part) -> Tensor | None:
        name = f"{part.module}.weight_zero_point"
        if name not in checkpoint.tensors:
            return None
        zero_point = checkpoint.read(name)
        if not zero_point.float().any():
            return None
        if self.symmetric:
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {name} is not zero, but the quantization settings "
                "say symmetric; set symmetric to false there if the weights were quantised so"
            )
        return self._expanded(zero_point, part)

    def _expanded(self, values: Tensor, part: Part) -> Tensor:
        """The values of a tensor shaped like scale for the part, to be broadcast; float32."""
        if self.per == "tensor":
            return values.float().reshape(1, 1)
        if self.per == "channel":
            return values.float()[part.rows]
        rows = torch.arange(part.rows.start, part.rows.stop) // self.block[0]
        inputs = torch.arange(part.inputs.start, part.inputs.stop) // self.block[1]
        return values.float()[rows][:, inputs]

    def _scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        if self.per == "tensor":
            return (1,)
        if self.per == "channel":
            return out_features, 1
        return -(-out_features // self.block[0]), -(-in_features // self.block[1])

    def _zero_point(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        shape = self._scale_shape(out_features, in_features)
        return {"weight_zero_point": ExpectedTensor(shape, ("I8", "F8_E4M3", "F32", "F16", "BF16"))}
