"""Output: how a quantised layer is stored, and what each format cannot express.

Between the methods' results, by role, and the tensors of a checkpoint, by name. It knows no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.models.layout import layer_linears
from engine.models.spec import DecoderSpec
from engine.weights.formats.awq import awq_config, encode_awq
from engine.weights.formats.compressed_tensors import (
    compressed_tensors_config,
    encode_pack_quantized,
    encode_w8,
)
from engine.weights.formats.gptq import Version, encode_gptq, gptq_config
from engine.weights.matrix import Int4Matrix, Matrix, W8Matrix
from engine.weights.stored import StoredLinear

Format: TypeAlias = Literal["awq", "gptq", "compressed-tensors", "dense"]
Kind: TypeAlias = Literal["int4", "int8", "fp8", "dense"]

FORMATS = ("awq", "gptq", "compressed-tensors")
WHOLE = -1  # as a group size: all inputs are one group
GROUP_SIZES = (32, 64, 128)
COMMON_HEAD = "lm_head"  # which no reader takes for quantised unless it is told to
PACKED = 8  # outputs, or inputs, in a word of AWQ and GPTQ


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """`format` "dense" stores plain weights, whose `kind` is then dense, too."""

    format: Format
    kind: Kind
    group_size: int = WHOLE  # of int4
    symmetric: bool = False
    act_order: bool = False
    skip: tuple[str, ...] = ()  # parts of names of linears that stay as they are

    def __post_init__(self) -> None:
        """ConfigError for what the format cannot say."""
        if (self.format == "dense") != (self.kind == "dense"):
            raise ConfigError(f"{self.kind} weights cannot be stored as {self.format}")
        if self.kind in ("int8", "fp8") and self.format != "compressed-tensors":
            raise ConfigError(
                f"--format {self.format} stores 4-bit weights; {self.kind} ones need "
                "compressed-tensors"
            )
        if self.act_order and self.format == "awq":
            raise ConfigError(
                "--format awq cannot store the order of --desc-act; use --format gptq or "
                "compressed-tensors, or --no-desc-act"
            )
        if self.kind == "int4" and self.group_size not in (*GROUP_SIZES, WHOLE):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ConfigError(
                f"--w-group-size must be one of {sizes}, or -1 for one group of all inputs, got "
                f"{self.group_size}"
            )

    def skips(self, module: str) -> bool:
        return any(part in module for part in self.skip)

    def check(self, spec: DecoderSpec) -> None:
        """CheckpointError or ConfigError for a model whose linears cannot be stored so."""
        linears = [each for i in range(spec.num_layers) for each in stored_linears(spec, i)]
        for part in self.skip:
            if not any(part in linear.module for linear in linears):
                raise ConfigError(
                    f"--skip {part} matches no linear; they are called {linears[0].module} and so "
                    "on"
                )
        converted = [linear for linear in linears if not self.skips(linear.module)]
        if not converted:
            raise ConfigError("--skip leaves no linear to quantise")
        if self.kind != "int4":
            return
        for linear in converted:
            if self.group_size != WHOLE and linear.in_features % self.group_size:
                raise CheckpointError(
                    f"{linear.module}: {linear.in_features} inputs are no multiple of group size "
                    f"{self.group_size}; allowed for this model: {self._allowed(converted)}"
                )
            if linear.out_features % PACKED or linear.in_features % PACKED:
                raise CheckpointError(
                    f"{linear.module}: [{linear.out_features}, {linear.in_features}] does not fill "
                    f"words of {PACKED} weights in both directions; leave it out with --skip"
                )

    @property
    def _version(self) -> Version:
        """Of GPTQ's layout: the first cannot hold every zero."""
        return "gptq" if self.symmetric else "gptq_v2"

    def _allowed(self, linears: list[StoredLinear]) -> str:
        sizes = [str(size) for size in fitting_group_sizes(linears)]
        return ", ".join([*sizes, "-1 (one group of all inputs)"])

    def tensors(
        self,
        spec: DecoderSpec,
        index: int,
        linears: Mapping[str, Matrix],
        biases: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The stored linears of layer `index`, from its linears and biases by role."""
        dtype = getattr(torch, spec.dtype)
        found: dict[str, Tensor] = {}
        for linear, order in rows_of_stored(spec, index):
            matrix = merge([linears[role] for role in order.roles], order.rows)
            for suffix, tensor in self._encode(matrix, dtype).items():
                found[f"{linear.module}.{suffix}"] = tensor
            if linear.bias:
                bias = torch.cat([biases[role] for role in order.roles])
                found[f"{linear.module}.bias"] = _pick(bias, order.rows).to(dtype)
        return found

    def quantization_config(self, spec: DecoderSpec) -> dict[str, Any] | None:
        """For config.json; None when the weights are dense."""
        skipped = [
            linear.module
            for index in range(spec.num_layers)
            for linear in stored_linears(spec, index)
            if self.skips(linear.module)
        ]
        if spec.names.head != COMMON_HEAD:
            skipped.append(spec.names.head)
        if self.format == "dense":
            return None
        if self.format == "awq":
            return awq_config(self.group_size, self.symmetric, skipped)
        if self.format == "gptq":
            return gptq_config(
                self.group_size, self.symmetric, self.act_order, skipped, self._version
            )
        assert self.kind != "dense"
        group_size = self.group_size if self.kind == "int4" else None
        return compressed_tensors_config(
            self.kind, group_size, self.symmetric, self.act_order, skipped
        )

    def num_bytes(self, spec: DecoderSpec) -> int:
        """About what a layer takes; norms are left out."""
        return sum(self._linear_bytes(linear, spec) for linear in stored_linears(spec, 0))

    def _linear_bytes(self, linear: StoredLinear, spec: DecoderSpec) -> int:
        n, k = linear.out_features, linear.in_features
        if self.kind == "dense" or self.skips(linear.module):
            return n * k * int(getattr(torch, spec.dtype).itemsize)
        if self.kind != "int4":
            return n * k + 4 * n
        groups = 1 if self.group_size == WHOLE else -(-k // self.group_size)
        return n * k // 2 + groups * n * 5 // 2 + 4 * k  # fp16 scale, 4-bit zero, g_idx

    def _encode(self, matrix: Matrix, dtype: torch.dtype) -> dict[str, Tensor]:
        if isinstance(matrix, Tensor):
            return {"weight": matrix.to(dtype)}
        if isinstance(matrix, W8Matrix):
            return encode_w8(matrix)
        if self.format == "awq":
            return encode_awq(matrix)
        if self.format == "gptq":
            return encode_gptq(matrix, self._version)
        return encode_pack_quantized(matrix, self.symmetric)


@dataclass(frozen=True, slots=True)
class Order:
    """Rows of a stored linear: those of the roles end to end, taken in the order `rows`."""

    roles: tuple[str, ...]
    rows: Tensor | None = None  # int64 [N]; None: as they come


def stored_linears(spec: DecoderSpec, index: int) -> list[StoredLinear]:
    linears = layer_linears(spec, index)
    return [*linears.qkv, linears.o, linears.gate, linears.up, linears.down]


def rows_of_stored(spec: DecoderSpec, index: int) -> list[tuple[StoredLinear, Order]]:
    """What each stored linear of a layer is made of; q, k and v are one in some families."""
    linears = layer_linears(spec, index)
    rest = [(linears.o, "o"), (linears.gate, "gate"), (linears.up, "up"), (linears.down, "down")]
    found = [(linear, Order((role,))) for linear, role in rest]
    if len(linears.qkv) == 3:
        return [
            (each, Order((role,))) for each, role in zip(linears.qkv, "qkv", strict=True)
        ] + found
    return [(linears.qkv[0], Order(("q", "k", "v"), _grouped_rows(spec))), *found]


def fitting_group_sizes(linears: list[StoredLinear]) -> list[int]:
    """Of GROUP_SIZES, those that divide the inputs of all."""
    return [g for g in GROUP_SIZES if all(linear.in_features % g == 0 for linear in linears)]


def _grouped_rows(spec: DecoderSpec) -> Tensor:
    """For each kv head the rows of its query heads, of its keys and of its values."""
    dim, kv_heads = spec.head_dim, spec.num_kv_heads
    q_rows, kv_rows = spec.num_heads * dim, kv_heads * dim
    parts = (
        torch.arange(q_rows),
        torch.arange(q_rows, q_rows + kv_rows),
        torch.arange(q_rows + kv_rows, q_rows + 2 * kv_rows),
    )
    return torch.cat([part.view(kv_heads, -1) for part in parts], dim=1).flatten()


def merge(matrices: list[Matrix], rows: Tensor | None) -> Matrix:
    """The outputs of all end to end, then in the order `rows`; of one form and one input order."""
    first = matrices[0]
    if rows is None and len(matrices) == 1:
        return first
    if isinstance(first, Int4Matrix):
        parts = [each for each in matrices if isinstance(each, Int4Matrix)]
        assert len(parts) == len(matrices)
        return Int4Matrix(
            _pick(torch.cat([each.q for each in parts], dim=1).t(), rows).t(),
            _pick(torch.cat([each.zeros for each in parts], dim=1).t(), rows).t(),
            _pick(torch.cat([each.scales for each in parts], dim=1).t(), rows).t(),
            first.input_order,
        )
    if isinstance(first, W8Matrix):
        eights = [each for each in matrices if isinstance(each, W8Matrix)]
        assert len(eights) == len(matrices)
        # Rows of float8 cannot be picked; their bytes can.
        q = torch.cat([each.q.view(torch.int8) for each in eights])
        scales = torch.cat([each.scales for each in eights])
        return W8Matrix(_pick(q, rows).view(first.q.dtype), _pick(scales, rows))
    dense = [each for each in matrices if isinstance(each, Tensor)]
    assert len(dense) == len(matrices)
    return _pick(torch.cat(dense), rows)


def _pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows.to(tensor.device)]
