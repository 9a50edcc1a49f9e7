"""What a decoder will take on each rank, known from its spec alone: no file of weights is needed.

Runs the loader's own cutting and packing (RankWeights) over tensors of shapes without memory, so
that there is no second account of it to keep true.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.models.layout import expected_tensors
from engine.models.rank_weights import RankWeights
from engine.models.rope import rotary_table
from engine.models.sharding import Shard, check_pp, check_tp
from engine.models.spec import DecoderSpec
from engine.weights.checkpoint import ALL, Checkpoint
from engine.weights.matrix import Int4Matrix
from engine.weights.stored import Piece, StoredLinear
from kernels.dense_linear import multiplies_bf16, pack_dense
from kernels.gpu.w4a16_pack import W4A16Weight
from kernels.int4_aten import AtenInt4Weight
from kernels.int4_linear import pack_int4

# Inputs, with those that fill groups up; outputs; group size, 0: dense.
Shape: TypeAlias = tuple[int, int, int]
# By safetensors' names; the others are of the checkpoint's float dtype.
DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on each rank of a stage."""

    weights: int  # with the table of rotary angles
    read_per_step: int  # of them, what a decode step of few rows reads
    scratch: int  # beside them, for a step of many rows: the largest int4 weight, dequantised


def footprint(
    spec: DecoderSpec,
    *,
    tp: int,
    dtype: torch.dtype,
    device: str,
    session_len: int,
    stage: int = 0,
    pp: int = 1,
) -> Footprint:
    """Of a rank of one stage.

    On the CPU the packing is that of this machine's instructions. A tied head that is stored all
    the same counts as equal to the embedding.
    """
    check_tp(spec, tp)
    check_pp(spec, pp)
    shapes, shard = cast(Checkpoint, _Shapes(spec)), Shard.of(spec, 0, tp, stage, pp)
    with torch.device("meta"), _NoMemory():
        weights = _Rank(shapes, spec, shard, dtype, device, int8_activations=False)
        values = dict(weights)
    sizes = {name: _num_bytes(value) for name, value in values.items()}
    reads = {name: _num_bytes(_decoding_part(value)) for name, value in values.items()}
    if "head" in sizes or not shard.is_last:
        reads.pop("embed", None)  # a few rows of it
    elif device == "cpu" and dtype == torch.bfloat16 and multiplies_bf16():
        sizes["head"] = sizes["embed"]  # a copy in oneDNN's layout
    total = sum(sizes.values())
    angles = rotary_table(spec.rope, spec.head_dim, 1, dtype, "cpu")
    table = session_len * sum(_num_bytes(part) for part in angles)
    return Footprint(total + table, sum(reads.values()), _scratch(values.values(), dtype))


def checkpoint_bytes(spec: DecoderSpec) -> int:
    """Of the tensors in its files."""
    shapes = _Shapes(spec)
    return sum(_num_bytes(shapes.read(name)) for name in shapes.tensors)


class _Shapes:
    """A checkpoint of this spec as RankWeights reads it."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.tensors = expected_tensors(spec, head=not spec.tie_word_embeddings)
        self._spec = spec

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        expected = self.tensors[name]
        dtype = DTYPES.get(expected.dtypes[0], getattr(torch, self._spec.dtype))
        if name.endswith(".scales"):
            dtype = torch.float16
        shape = [max(0, size) for size in expected.shape]  # of any length: some bytes of JSON
        value = torch.empty(shape, dtype=dtype, device="meta")
        return value[rows, columns] if value.dim() == 2 else value[rows]

    read_finite = read


class _Rank(RankWeights):
    """Without reading and unpacking what the checkpoint would hold, and packing each shape once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed: dict[Shape, Any] = {}

    def _weight(self, pieces: list[Piece], inputs: slice) -> Any:
        num_outputs = sum(piece.stop - piece.start for piece in pieces)
        forms = [piece.stored.format.int4_shape(piece.part(inputs)) for piece in pieces]
        int4 = [form for form in forms if form is not None]
        if len(int4) < len(forms):
            shape = inputs.stop - inputs.start, num_outputs, 0
        else:
            shape = int4[0][0], num_outputs, math.gcd(*(size for _, size in int4))
        if shape not in self._packed:
            self._packed[shape] = self._pack(shape, inputs.stop - inputs.start)
        return self._packed[shape]

    def _pack(self, shape: Shape, layer_inputs: int) -> Any:
        num_inputs, num_outputs, group_size = shape
        if not group_size:
            return pack_dense(torch.empty(num_outputs, num_inputs, dtype=self._dtype))
        matrix = _int4_matrix(shape)
        order = None
        if num_inputs > layer_inputs:  # inputs that fill groups up name others again
            order = torch.arange(num_inputs, device="cpu") % layer_inputs
        return pack_int4(
            matrix.q, matrix.zeros, matrix.scales, self._dtype, self._device, input_order=order
        )

    def _vocab_rows(self, table: StoredLinear) -> Tensor:
        return torch.empty(len(self._shard.vocab), table.in_features, dtype=self._dtype)


def _int4_matrix(shape: Shape) -> Int4Matrix:
    num_inputs, num_outputs, group_size = shape
    groups = num_inputs // group_size
    return Int4Matrix(
        q=torch.empty(num_inputs, num_outputs, dtype=torch.uint8),
        zeros=torch.empty(groups, num_outputs, dtype=torch.uint8),
        scales=torch.empty(groups, num_outputs, dtype=torch.float16),
    )


class _NoMemory(TorchFunctionMode):
    """A tensor without memory stays one, whatever device it is sent to."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], str):
            args = (args[0], "meta", *args[2:])
        return func(*args, **(kwargs or {}))


def _decoding_part(value: Any) -> Any:
    """Of a weight in two forms, the one for few rows."""
    return (value.few_rows or value) if isinstance(value, AtenInt4Weight) else value


def _scratch(values: Iterable[Any], dtype: torch.dtype) -> int:
    packed = (value for value in values if isinstance(value, W4A16Weight))
    return max((n * k * dtype.itemsize for n, k in (each.shape for each in packed)), default=0)


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if is_dataclass(value):
        return sum(_num_bytes(getattr(value, field.name)) for field in fields(value))
    return 0
