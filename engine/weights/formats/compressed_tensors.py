"""compressed-tensors (llm-compressor): packed integers, and 8-bit values (format scaled.py).

    weight_packed     int32 [N, ceil(K*bits/32)]   in order along K, stored as q + 2^(bits-1)
    weight_scale      [N, G]                       G = ceil(K / group_size), 1 for a channel
    weight_zero_point int32 [ceil(N*bits/32), G]   asymmetric alone; in order along N, stored alike
    weight_shape      int64 [2]                    N and K
    weight_g_idx      int32 [K]                    act-order alone: the group of each input

w[n, k] = (q - zero) * scale. A g_idx of -1 throughout was never filled in and says nothing. Layout:
compressed-tensors 0.20; g_idx: 0.9, for later versions write no act-order that needs one.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.weights.checkpoint import Checkpoint, ExpectedTensor
from engine.weights.formats.gptq import INDEX_DTYPES, rows_by_input
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
    values_per_word,
    word_slice,
)
from engine.weights.matrix import Int4Matrix, Matrix, W8Matrix

Kind = Literal["int4", "int8", "fp8"]


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """`format` "pack-quantized"."""

    bits: int
    group_size: int  # -1: all inputs are one group (strategy "channel")
    symmetric: bool
    act_order: bool

    def check(self, module: str, out_features: int, in_features: int) -> None:
        """Every size will do: the last word and the last group may be filled in part."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        per_word, size = values_per_word(self.bits), self._size(in_features)
        groups, hint = num_groups(in_features, size), groups_hint(size)
        zero = ExpectedTensor((-(-out_features // per_word), groups), ("I32",), hint)
        return {
            "weight_packed": ExpectedTensor((out_features, -(-in_features // per_word)), ("I32",)),
            "weight_scale": ExpectedTensor((out_features, groups), hint=hint),
            "weight_shape": ExpectedTensor((2,), ("I64",)),
            **({} if self.symmetric else {"weight_zero_point": zero}),
            **(self._order(in_features) if self.act_order else {}),
        }

    def optional(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        return self._order(in_features)

    def read(self, checkpoint: Checkpoint, part: Part) -> Matrix:
        module, bits, size = part.module, self.bits, self._size(part.in_features)
        group_of = self._group_of(checkpoint, part, size)
        groups = slice(0, num_groups(part.in_features, size))
        if group_of is None:
            groups = group_slice(part.inputs, size)
        words, own_inputs = word_slice(part.inputs, bits)
        packed = checkpoint.read(f"{module}.weight_packed", part.rows, words)
        scales = checkpoint.read_finite(f"{module}.weight_scale", part.rows, groups)
        scales = scales.t().contiguous()
        return Levels(
            q=unpack_columns(packed.t().contiguous(), bits)[own_inputs],
            zeros=self._zeros(checkpoint, part, groups, scales),
            scales=scales,
            inputs=part.inputs,
            group_size=size,
            group_of=group_of,
            bits=bits,
        ).matrix()

    def int4_shape(self, part: Part) -> tuple[int, int] | None:
        return int4_shape(part, self.bits, self._size(part.in_features), self.act_order)

    def _zeros(self, checkpoint: Checkpoint, part: Part, groups: slice, scales: Tensor) -> Tensor:
        """uint8 [G, N]."""
        if self.symmetric:
            return torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)
        words, own = word_slice(part.rows, self.bits)
        packed = checkpoint.read(f"{part.module}.weight_zero_point", words, groups)
        return unpack_columns(packed, self.bits)[own].t().contiguous()

    def _group_of(self, checkpoint: Checkpoint, part: Part, size: int) -> Tensor | None:
        name = f"{part.module}.weight_g_idx"
        if name not in checkpoint.tensors or bool((checkpoint.read(name) == -1).all()):
            return None
        return read_group_of(checkpoint, name, part, size)

    def _size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def _order(self, in_features: int) -> dict[str, ExpectedTensor]:
        return {"weight_g_idx": ExpectedTensor((in_features,), INDEX_DTYPES)}


def encode_pack_quantized(matrix: Int4Matrix, symmetric: bool) -> dict[str, Tensor]:
    """4 bits; scales keep their dtype.

    ValueError when `symmetric` and a zero is not 8, or for an order of inputs that repeats one.
    """
    if symmetric and bool((matrix.zeros != 8).any()):
        raise ValueError("symmetric weights have the zero 8 everywhere; these have others")
    q, group_of = rows_by_input(matrix)
    num_outputs, num_inputs = q.shape[1], q.shape[0]
    encoded = {
        "weight_packed": pack_columns(q, 4).t().contiguous(),
        "weight_scale": matrix.scales.t().contiguous(),
        "weight_shape": torch.tensor([num_outputs, num_inputs], dtype=torch.int64),
    }
    if not symmetric:
        encoded["weight_zero_point"] = pack_rows(matrix.zeros, 4).t().contiguous()
    if matrix.input_order is not None:
        encoded["weight_g_idx"] = group_of.to(torch.int32)
    return encoded


def encode_w8(matrix: W8Matrix) -> dict[str, Tensor]:
    """`format` "int-quantized" or "float-quantized", one scale per output."""
    return {"weight": matrix.q.contiguous(), "weight_scale": matrix.scales.unsqueeze(1)}


def compressed_tensors_config(
    kind: Kind,
    group_size: int | None,
    symmetric: bool,
    act_order: bool,
    skipped: list[str],
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint of the encoders above.

    `group_size` is int4's; None or -1: one scale per output. int8 and fp8 are W8A8: activations
    are to be quantised per token, by engines that do. compressed-tensors 0.20 refuses act-order.
    """
    grouped = kind == "int4" and group_size not in (None, -1)
    weights = {
        "num_bits": 4 if kind == "int4" else 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": group_size if grouped else None,
        "actorder": "group" if act_order else None,
        "dynamic": False,
    }
    activations = {
        "num_bits": 8,
        "type": weights["type"],
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    formats = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": formats[kind],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None if kind == "int4" else activations,
                "output_activations": None,
            }
        },
        "ignore": list(dict.fromkeys(["lm_head", *skipped])),
    }
