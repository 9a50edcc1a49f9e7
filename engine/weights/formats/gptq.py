"""GPTQ: unsigned values of 2, 4 or 8 bits, in groups of inputs that may be scattered (act-order).

    qweight int32 [K*bits/32, N]   values in order along K
    qzeros  int32 [G, N*bits/32]   values in order along N; version 1 stores zero - 1
    scales  [G, N]                 G = ceil(K / group_size)
    g_idx   int32 [K]              the group of each input; without act-order k // group_size

w[n, k] = (q - zero) * scale of group g_idx[k]. In version 1 zero = (stored + 1) modulo 2^bits. Such
a file cannot say surely that a zero is 0: GPTQModel adds 1 to whole words, so that the carry of a
stored 15 reaches the next zero. Symmetric weights have 8 everywhere; asymmetric ones should be
written as version 2. Layouts: AutoGPTQ 0.7, GPTQModel's `checkpoint_format`.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint, ExpectedTensor
from engine.weights.formats.groups import group_slice
from engine.weights.formats.levels import (
    Levels,
    groups_hint,
    int4_shape,
    num_groups,
    read_group_of,
)
from engine.weights.formats.weight_format import Part
from engine.weights.formats.words import (
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
    values_per_word,
    word_slice,
)
from engine.weights.matrix import Int4Matrix, Matrix

Version = Literal["gptq", "gptq_v2"]  # `checkpoint_format`
INDEX_DTYPES = ("I32", "I64")


@dataclass(frozen=True, slots=True)
class GptqFormat:
    bits: int
    group_size: int  # -1: all inputs are one group
    act_order: bool
    zero_offset: int  # 1 in version 1, 0 in version 2

    def check(self, module: str, out_features: int, in_features: int) -> None:
        per_word = values_per_word(self.bits)
        for size, what in ((in_features, "inputs"), (out_features, "outputs")):
            if size % per_word:
                raise CheckpointError(
                    f"{module}: {size} {what} are not a multiple of {per_word}, the number GPTQ "
                    f"packs into a word; if it is stored dense, the settings' dynamic must skip it "
                    f"(-:{re.escape(module)})"
                )

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        per_word, size = values_per_word(self.bits), self._size(in_features)
        groups, hint = num_groups(in_features, size), groups_hint(size)
        return {
            "qweight": ExpectedTensor((in_features // per_word, out_features), ("I32",)),
            "qzeros": ExpectedTensor((groups, out_features // per_word), ("I32",), hint),
            "scales": ExpectedTensor((groups, out_features), hint=hint),
            **(self._order(in_features) if self.act_order else {}),
        }

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        # AutoGPTQ gave every linear a bias, zeros where the model has none.
        return self._order(in_features) | {"bias": ExpectedTensor((out_features,))}

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        module, bits, size = part.module, self.bits, self._size(part.in_features)
        group_of = None
        if f"{module}.g_idx" in checkpoint.tensors:
            group_of = read_group_of(checkpoint, f"{module}.g_idx", part, size)
        groups = slice(0, num_groups(part.in_features, size))
        if group_of is None:
            groups = group_slice(part.inputs, size)
        words, own_inputs = word_slice(part.inputs, bits)
        columns, own = word_slice(part.rows, bits)
        qweight = checkpoint.read(f"{module}.qweight", words, part.rows)
        zeros = unpack_rows(checkpoint.read(f"{module}.qzeros", groups, columns), bits)[:, own]
        return Levels(
            q=unpack_columns(qweight, bits)[own_inputs],
            zeros=(zeros + self.zero_offset) & ((1 << bits) - 1),
            scales=checkpoint.read_finite(f"{module}.scales", groups, part.rows),
            inputs=part.inputs,
            group_size=size,
            group_of=group_of,
            bits=bits,
        ).matrix()

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        return int4_shape(part, self.bits, self._size(part.in_features), self.act_order)

    def _size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def _order(self, in_features: int) -> dict[str, ExpectedTensor]:
        return {"g_idx": ExpectedTensor((in_features,), INDEX_DTYPES)}


def encode_gptq(matrix: Int4Matrix, version: Version = "gptq") -> dict[str, Tensor]:
    """4 bits; scales become fp16. ValueError for an order of inputs that repeats one (padding)."""
    q, group_of = rows_by_input(matrix)
    stored = (matrix.zeros - (1 if version == "gptq" else 0)) & 15
    return {
        "qweight": pack_columns(q, 4),
        "qzeros": pack_rows(stored, 4),
        "scales": matrix.scales.to(torch.float16).contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def gptq_config(
    group_size: int,
    symmetric: bool,
    desc_act: bool,
    skipped: list[str],
    version: Version = "gptq",
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint of `encode_gptq`; `skipped` are names of modules."""
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in skipped}
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": version,
        **({"dynamic": dynamic} if dynamic else {}),
    }


def rows_by_input(matrix: Int4Matrix) -> tuple[Tensor, Tensor]:
    """q [K, N] with the inputs in their own order, and the group of each, int64 [K]."""
    inputs = torch.arange(len(matrix.q), device=matrix.q.device)
    groups = inputs // matrix.group_size
    if matrix.input_order is None:
        return matrix.q, groups
    place = torch.argsort(matrix.input_order)
    if not torch.equal(matrix.input_order[place], inputs):
        raise ValueError("inputs that repeat as padding cannot be written: they are a rank's cut")
    return matrix.q[place], groups[place]
