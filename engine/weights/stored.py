"""Linears as they are stored, and reading a part of one: dense [N, K] or AWQ "gemm"."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.weights.awq import NIBBLES_PER_WORD, dequantize, unpack_awq
from engine.weights.checkpoint import Checkpoint, ExpectedTensor
from engine.weights.matrix import Int4Matrix


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """One linear of a checkpoint; without a group_size it is dense."""

    module: str
    out_features: int
    in_features: int
    bias: bool
    group_size: int | None

    def __post_init__(self) -> None:
        if self.group_size is None:
            return
        if self.in_features % self.group_size:
            raise CheckpointError(
                f"{self.module}: {self.in_features} inputs are not a multiple of AWQ's "
                f"group_size {self.group_size}"
            )
        if self.out_features % NIBBLES_PER_WORD:
            raise CheckpointError(
                f"{self.module}: {self.out_features} outputs are not a multiple of "
                f"{NIBBLES_PER_WORD}, the number AWQ packs into a word"
            )

    def tensors(self) -> dict[str, ExpectedTensor]:
        """Its tensors by name."""
        n, k = self.out_features, self.in_features
        found = {f"{self.module}.bias": ExpectedTensor((n,))} if self.bias else {}
        if self.group_size is None:
            return found | {f"{self.module}.weight": ExpectedTensor((n, k))}
        words, groups = n // NIBBLES_PER_WORD, k // self.group_size
        return found | {
            f"{self.module}.qweight": ExpectedTensor((k, words), ("I32",)),
            f"{self.module}.qzeros": ExpectedTensor((groups, words), ("I32",)),
            f"{self.module}.scales": ExpectedTensor((groups, n)),
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """Output features [start, stop) of a stored linear."""

    stored: StoredLinear
    start: int
    stop: int


def read_bias(checkpoint: Checkpoint, pieces: list[Piece]) -> Tensor | None:
    """The pieces' biases end to end; None when they have none."""
    parts = [
        checkpoint.read(f"{piece.stored.module}.bias", slice(piece.start, piece.stop))
        for piece in pieces
        if piece.stored.bias
    ]
    return torch.cat(parts) if parts else None


def read_weight(
    checkpoint: Checkpoint, pieces: list[Piece], inputs: slice, dtype: torch.dtype
) -> Tensor | Int4Matrix:
    """The pieces side by side along N, restricted to the input features `inputs`.

    All int4 gives an Int4Matrix; a dense piece among them makes the result dense, [N, K].
    """
    if all(piece.stored.group_size is not None for piece in pieces):
        parts = [_read_int4(checkpoint, piece, inputs) for piece in pieces]
        if len(parts) == 1:
            return parts[0]
        return Int4Matrix(
            torch.cat([part.q for part in parts], dim=1),
            torch.cat([part.zeros for part in parts], dim=1),
            torch.cat([part.scales for part in parts], dim=1),
        )
    dense = [_read_dense(checkpoint, piece, inputs).to(dtype) for piece in pieces]
    return torch.cat(dense) if len(dense) > 1 else dense[0]


def _read_dense(checkpoint: Checkpoint, piece: Piece, inputs: slice) -> Tensor:
    if piece.stored.group_size is not None:
        matrix = _read_int4(checkpoint, piece, inputs)
        return dequantize(matrix.q, matrix.zeros, matrix.scales).t().contiguous()
    rows = slice(piece.start, piece.stop)
    return checkpoint.read(f"{piece.stored.module}.weight", rows, inputs)


def _read_int4(checkpoint: Checkpoint, piece: Piece, inputs: slice) -> Int4Matrix:
    module, group_size = piece.stored.module, piece.stored.group_size
    assert group_size is not None
    assert inputs.start % group_size == 0
    assert inputs.stop % group_size == 0
    groups = slice(inputs.start // group_size, inputs.stop // group_size)
    # Read whole words, cut to the piece after unpacking: a head of 20 or 12 ends within a word.
    words = slice(piece.start // NIBBLES_PER_WORD, -(-piece.stop // NIBBLES_PER_WORD))
    q, zeros = unpack_awq(
        checkpoint.read(f"{module}.qweight", inputs, words),
        checkpoint.read(f"{module}.qzeros", groups, words),
    )
    first = piece.start - words.start * NIBBLES_PER_WORD
    columns = slice(first, first + piece.stop - piece.start)
    scales = checkpoint.read(f"{module}.scales", groups, slice(piece.start, piece.stop))
    return Int4Matrix(q[:, columns], zeros[:, columns], scales)
