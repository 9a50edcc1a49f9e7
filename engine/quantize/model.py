"""DenseModel: a checkpoint of any format as dense layers, read from disk one at a time.

It holds the open checkpoint and the tables outside the layers; the caller holds hidden states.
"""

from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.layout import HARMLESS, expected_tensors, optional_tensors
from engine.models.spec import DecoderSpec
from engine.quantize.layer import DenseLayer, rms_norm
from engine.weights.checkpoint import Checkpoint

TABLE_ROWS = 4096  # of a head's table that are converted at once


class DenseModel:
    """A context manager, as its checkpoint is one; every tensor's name and shape is checked."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self._own_head = f"{spec.names.head}.weight" in checkpoint.tensors
        own_head = self._own_head or not spec.tie_word_embeddings
        checkpoint.verify(expected_tensors(spec, head=own_head), HARMLESS, optional_tensors(spec))

    def __enter__(self) -> "DenseModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.checkpoint.__exit__(kind, error, trace)

    def embed(self, token_ids: Tensor) -> Tensor:
        """ids [B, T] -> hidden [B, T, H], on the device; the table itself is not kept."""
        table = self.checkpoint.read(f"{self.spec.names.embed}.weight")
        return F.embedding(token_ids.cpu(), table).to(self.device, self.dtype)

    def layer(self, index: int) -> DenseLayer:
        return DenseLayer.read(self.checkpoint, self.spec, index, self.dtype, self.device)

    def head(self, beside: "Head | None" = None) -> "Head":
        """Read once for many batches: the table may be a gigabyte.

        A table that equals that of the head `beside` is held once.
        """
        names = self.spec.names
        name = names.head if self._own_head else names.embed
        table = self.checkpoint.read(f"{name}.weight").to(self.device)
        if beside is not None and torch.equal(table, beside.table):
            table = beside.table
        return Head(self._read(f"{names.norm}.weight"), table, self.spec.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's hidden [..., H] -> [..., V]."""
        return self.head().logits(hidden)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.device, self.dtype)


class Head:
    """The final norm [H] and the table [V, H] that turn hidden states into logits.

    The table stays in the checkpoint's dtype; what is computed is in the hidden states' dtype.
    """

    def __init__(self, norm: Tensor, table: Tensor, eps: float) -> None:
        self.table = table
        self._norm = norm
        self._eps = eps

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's hidden [..., H] -> [..., V]."""
        x = rms_norm(hidden, self._norm, self._eps)
        if self.table.dtype == x.dtype:
            return F.linear(x, self.table)
        logits = x.new_empty(*x.shape[:-1], len(self.table))
        for start in range(0, len(self.table), TABLE_ROWS):
            rows = slice(start, start + TABLE_ROWS)
            logits[..., rows] = F.linear(x, self.table[rows].to(x.dtype))
        return logits
