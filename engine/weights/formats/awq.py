"""AWQ's formats "gemm" and "gemv": 4 bits, a zero and a scale per group of inputs and output.

    gemm   qweight int32 [K, N/8]   qzeros int32 [K/g, N/8]   scales [K/g, N]   AutoAWQ's word order
    gemv   qweight int32 [N, K/8]   qzeros int32 [N, Z]       scales [N, 8 Z]   values in order

w[n, k] = (q - zero) * scale. A gemv checkpoint pads its groups to Z whole words, rounded up to a
multiple of 1, 2 or 4 words for g from 128 on, 64 and 32. Layouts: AutoAWQ 0.2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.weights.awq import NIBBLES_PER_WORD, pack_awq, unpack_awq
from engine.weights.checkpoint import Checkpoint, ExpectedTensor
from engine.weights.formats.groups import group_slice, in_order
from engine.weights.formats.levels import groups_hint, int4_shape
from engine.weights.formats.weight_format import Part
from engine.weights.formats.words import unpack_columns, unpack_rows, word_slice
from engine.weights.matrix import Int4Matrix, Matrix

BITS = 4
GEMV_GROUPS = {32: 4, 64: 2, 128: 1}  # group size -> words that Z is a multiple of


@dataclass(frozen=True, slots=True)
class AwqGemmFormat:
    group_size: int  # -1: all inputs are one group

    def check(self, module: str, out_features: int, in_features: int) -> None:
        _check_groups(module, in_features, self.group_size)
        if out_features % NIBBLES_PER_WORD:
            raise CheckpointError(
                f"{module}: {out_features} outputs are not a multiple of {NIBBLES_PER_WORD}, the "
                "number AWQ packs into a word; name the module in modules_to_not_convert if it is "
                "stored dense"
            )

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        size = self._size(in_features)
        words, groups = out_features // NIBBLES_PER_WORD, in_features // size
        hint = groups_hint(size)
        return {
            "qweight": ExpectedTensor((in_features, words), ("I32",)),
            "qzeros": ExpectedTensor((groups, words), ("I32",), hint),
            "scales": ExpectedTensor((groups, out_features), hint=hint),
        }

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return {}

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        size = self._size(part.in_features)
        groups = group_slice(part.inputs, size)
        # Read whole words, cut to the part after unpacking: a head of 20 or 12 ends within a word.
        words, columns = word_slice(part.rows, BITS)
        q, zeros = unpack_awq(
            checkpoint.read(f"{part.module}.qweight", part.inputs, words),
            checkpoint.read(f"{part.module}.qzeros", groups, words),
        )
        scales = checkpoint.read_finite(f"{part.module}.scales", groups, part.rows)
        return in_order(q[:, columns], zeros[:, columns], scales, part.inputs, size)

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        return int4_shape(part, BITS, self._size(part.in_features), act_order=False)

    def _size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True, slots=True)
class AwqGemvFormat:
    group_size: int  # 32, 64 or a multiple of 128

    def check(self, module: str, out_features: int, in_features: int) -> None:
        _check_groups(module, in_features, self.group_size)
        if in_features % NIBBLES_PER_WORD:
            raise CheckpointError(
                f"{module}: {in_features} inputs are not a multiple of {NIBBLES_PER_WORD}, the "
                "number AWQ gemv packs into a word; name the module in modules_to_not_convert if "
                "it is stored dense"
            )

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        n, words = out_features, self._zero_words(in_features)
        hint = groups_hint(self.group_size)
        return {
            "qweight": ExpectedTensor((n, in_features // NIBBLES_PER_WORD), ("I32",)),
            "qzeros": ExpectedTensor((n, words), ("I32",), hint),
            "scales": ExpectedTensor((n, words * NIBBLES_PER_WORD), hint=hint),
        }

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return {}

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        groups = group_slice(part.inputs, self.group_size)
        words, columns = word_slice(part.inputs, BITS)
        packed = checkpoint.read(f"{part.module}.qweight", part.rows, words)
        zero_words, own = word_slice(groups, BITS)
        zeros = unpack_rows(checkpoint.read(f"{part.module}.qzeros", part.rows, zero_words), BITS)
        scales = checkpoint.read_finite(f"{part.module}.scales", part.rows, groups)
        return in_order(
            unpack_columns(packed.t().contiguous(), BITS)[columns],
            zeros[:, own].t().contiguous(),
            scales.t().contiguous(),
            part.inputs,
            self.group_size,
        )

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        return int4_shape(part, BITS, self.group_size, act_order=False)

    def _zero_words(self, in_features: int) -> int:
        multiple = GEMV_GROUPS[min(self.group_size, 128)]
        words = -(-(in_features // self.group_size) // NIBBLES_PER_WORD)
        return -(-words // multiple) * multiple


def _check_groups(module: str, in_features: int, group_size: int) -> None:
    if group_size != -1 and in_features % group_size:
        raise CheckpointError(
            f"{module}: {in_features} inputs are not a multiple of AWQ's group_size {group_size}; "
            "correct it in the quantization settings, or name the module in "
            "modules_to_not_convert if it is stored dense"
        )


def encode_awq(matrix: Int4Matrix) -> dict[str, Tensor]:
    """In AWQ's gemm layout; scales become fp16. ValueError for inputs in another order."""
    if matrix.input_order is not None:
        raise ValueError("AWQ stores no order of inputs; write GPTQ or compressed-tensors")
    qweight, qzeros = pack_awq(matrix.q, matrix.zeros)
    return {
        "qweight": qweight.contiguous(),
        "qzeros": qzeros.contiguous(),
        "scales": matrix.scales.to(torch.float16).contiguous(),
    }


def awq_config(group_size: int, symmetric: bool, skipped: list[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint of `encode_awq`.

    `zero_point` says that zeros are stored, which the layout always does; `sym` that all are 8.
    """
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "sym": symmetric,
        **({"modules_to_not_convert": list(skipped)} if skipped else {}),
    }
