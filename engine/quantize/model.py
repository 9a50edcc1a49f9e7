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

    def head(self) -> "Head":
        """Read once for many batches: the table may be a gigabyte."""
        names = self.spec.names
        table = names.head if self._own_head else names.embed
        return Head(
            self._read(f"{names.norm}.weight"),
            self._read(f"{table}.weight"),
            self.spec.rms_norm_eps,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's hidden [..., H] -> [..., V]."""
        return self.head().logits(hidden)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.device, self.dtype)


class Head:
    """The final norm [H] and the table [V, H] that turn hidden states into logits."""

    def __init__(self, norm: Tensor, table: Tensor, eps: float) -> None:
        self._norm = norm
        self._table = table
        self._eps = eps

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's hidden [..., H] -> [..., V]."""
        return F.linear(rms_norm(hidden, self._norm, self._eps), self._table)
