"""What a decoder will take on each rank, known from its spec alone: no file of weights is needed.

Runs the loader's own cutting and packing (RankWeights) over tensors of shapes without memory, so
that there is no second account of it to keep true.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.models.layout import expected_tensors
from engine.models.rank_weights import RankWeights
from engine.models.rope import rotary_table
from engine.models.sharding import Shard, check_tp
from engine.models.spec import DecoderSpec
from engine.weights.checkpoint import ALL, Checkpoint
from engine.weights.stored import Int4Matrix, Piece, read_weight
from kernels.dense_linear import multiplies_bf16


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on each rank; all ranks hold the same."""

    weights: int  # with the table of rotary angles
    read_per_step: int  # of them, what a decode step reads: all but an embedding table of its own


def footprint(
    spec: DecoderSpec,
    *,
    tp: int,
    dtype: torch.dtype,
    device: str,
    session_len: int,
    int4: bool = False,
) -> Footprint:
    """`int4`: int4 linears in 4 bits and not as `device` keeps them today.

    On the CPU the packing is that of this machine's instructions. A tied head that is stored all
    the same counts as equal to the embedding.
    """
    check_tp(spec, tp)
    kind = _Int4Rank if int4 else RankWeights
    with _NoMemory():
        checkpoint = cast(Checkpoint, _Shapes(spec))
        shard = Shard.of(spec, 0, tp)
        weights = kind(checkpoint, spec, shard, dtype, device, int8_activations=False)
        sizes = {name: _num_bytes(value) for name, value in weights}
    tied = "head" not in sizes
    if tied and device == "cpu" and dtype == torch.bfloat16 and multiplies_bf16():
        sizes["head"] = sizes["embed"]  # a copy in oneDNN's layout
        tied = False
    total = sum(sizes.values())
    angles = rotary_table(spec.rope, spec.head_dim, 1, dtype, "cpu")
    table = session_len * sum(_num_bytes(part) for part in angles)
    return Footprint(total + table, total if tied else total - sizes["embed"])


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
        dtype = getattr(torch, self._spec.dtype)
        if expected.dtypes == ("I32",):
            dtype = torch.int32
        elif name.endswith(".scales"):
            dtype = torch.float16
        value = torch.empty(expected.shape, dtype=dtype, device="meta")
        return value[rows, columns] if value.dim() == 2 else value[rows]


class _Int4Rank(RankWeights):
    """4 bits per weight, a zero of 4 and a scale of 16 per group."""

    def _weight(self, pieces: list[Piece], inputs: slice) -> Any:
        weight = read_weight(self._checkpoint, pieces, inputs, self._dtype)
        return weight if isinstance(weight, Int4Matrix) else super()._weight(pieces, inputs)


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


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Int4Matrix):
        return (value.q.numel() + value.zeros.numel()) // 2 + value.scales.numel() * 2
    if is_dataclass(value):
        return sum(_num_bytes(getattr(value, field.name)) for field in fields(value))
    return 0
