"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, and LLM.int8.

4 bits, the weight [N, K] flattened to N*K values, two to a byte, the first in the high nibble:

    weight                       uint8 [ceil(N*K / 2), 1]
    weight.quant_map             fp32 [16]          the 16 values that there are
    weight.absmax                fp32 [N*K / 64]    one per block of 64 values
    weight.quant_state.bitsandbytes__nf4 (or fp4)   uint8: JSON with shape and block sizes

w = quant_map[value] * absmax. With double quantisation absmax is uint8 and stands for
nested_quant_map[absmax] * nested_absmax (fp32, one per 256 blocks) + nested_offset (in the JSON).

LLM.int8: `weight` int8 [N, K], `SCB` fp32 [N], w = q * SCB / 127. The outlying activations that
LLM.int8 keeps in 16 bits need no care here: all activations have 16 bits.

NF4's values lie on no straight line, so 4 bits are dequantised on reading and take the memory of
dense weights. Layouts: bitsandbytes 0.50.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.weights.checkpoint import ANY_LENGTH, Checkpoint, ExpectedTensor
from engine.weights.formats.weight_format import Part
from engine.weights.matrix import Matrix, W8Matrix

BLOCK = 64  # values with one scale; transformers offers no other
NESTED_BLOCK = 256
MAX_INT8 = 127


@dataclass(frozen=True, slots=True)
class Bnb4Format:
    quant_type: Literal["nf4", "fp4"]
    double: bool

    def check(self, module: str, out_features: int, in_features: int) -> None:
        """Every size will do: the last block may be short."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        count = out_features * in_features
        blocks = -(-count // BLOCK)
        hint = f"blocks of {BLOCK} values are supported"
        found = {
            "weight": ExpectedTensor((-(-count // 2), 1), ("U8",)),
            "weight.quant_map": ExpectedTensor((16,), ("F32",)),
            self._state: ExpectedTensor((ANY_LENGTH,), ("U8",)),
        }
        if not self.double:
            return found | {"weight.absmax": ExpectedTensor((blocks,), ("F32",), hint)}
        nested = -(-blocks // NESTED_BLOCK)
        return found | {
            "weight.absmax": ExpectedTensor((blocks,), ("U8",), hint),
            "weight.nested_absmax": ExpectedTensor((nested,), ("F32",)),
            "weight.nested_quant_map": ExpectedTensor((256,), ("F32",)),
        }

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return {}

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        """float32 [N, K]."""
        weight = f"{part.module}.weight"
        state = self._read_state(checkpoint, part)
        start, stop = part.rows.start * part.in_features, part.rows.stop * part.in_features
        packed = checkpoint.read(weight, slice(start // 2, -(-stop // 2))).flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
        codes = codes[start % 2 :][: stop - start]
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        absmax = self._absmax(checkpoint, weight, blocks, state)
        scales = absmax.repeat_interleave(BLOCK)[start % BLOCK :][: stop - start]
        values = checkpoint.read_finite(f"{weight}.quant_map")[codes.int()] * scales
        return values.view(-1, part.in_features)[:, part.inputs].contiguous()

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        return None

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.quant_type}"

    def _read_state(self, checkpoint: Checkpoint, part: Part) -> dict[str, Any]:
        name = f"{part.module}.{self._state}"
        try:
            state = json.loads(bytes(checkpoint.read(name).tolist()))
            nested = {"nested_blocksize": NESTED_BLOCK} if self.double else {}
            want = {"blocksize": BLOCK, "shape": [part.out_features, part.in_features], **nested}
            found = {key: state[key] for key in want}
            if self.double:
                float(state["nested_offset"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {name} is no description of a weight: {error!r}"
            ) from error
        if found != want:
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {name} says {found}, supported is {want}"
            )
        return dict(state)

    def _absmax(
        self, checkpoint: Checkpoint, weight: str, blocks: slice, state: dict[str, Any]
    ) -> Tensor:
        """float32, one per block."""
        if not self.double:
            return checkpoint.read_finite(f"{weight}.absmax", blocks)
        codes = checkpoint.read(f"{weight}.absmax", blocks)
        values = checkpoint.read_finite(f"{weight}.nested_quant_map")[codes.int()]
        nested = torch.arange(blocks.start, blocks.stop) // NESTED_BLOCK
        scales = checkpoint.read_finite(f"{weight}.nested_absmax")[nested]
        return values * scales + float(state["nested_offset"])


@dataclass(frozen=True, slots=True)
class BnbInt8Format:
    def check(self, module: str, out_features: int, in_features: int) -> None:
        """Every size will do."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return {
            "weight": ExpectedTensor((out_features, in_features), ("I8",)),
            "SCB": ExpectedTensor((out_features,), ("F32",)),
        }

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return {"weight_format": ExpectedTensor((1,), ("U8",))}

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        order = f"{part.module}.weight_format"
        if order in checkpoint.tensors and int(checkpoint.read(order)) != 0:
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {order} is not 0: the weight lies in an order of "
                "one kind of GPU; save the checkpoint again with bitsandbytes 0.45 or later"
            )
        q = checkpoint.read(f"{part.module}.weight", part.rows, part.inputs)
        scales = checkpoint.read_finite(f"{part.module}.SCB", part.rows)
        return W8Matrix(q, scales / MAX_INT8)

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        return None
