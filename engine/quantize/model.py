"""DenseModel: a checkpoint of any format as dense layers, read from disk one at a time.

It holds the open checkpoint and the tables outside the layers; the caller holds hidden states.
"""

from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import CheckpointError
from engine.models.layout import HARMLESS, expected_tensors, head_linear, optional_tensors
from engine.models.rank_weights import has_head
from engine.models.spec import DecoderSpec
from engine.quantize.layer import DenseLayer, rms_norm
from engine.weights.checkpoint import Checkpoint
from engine.weights.stored import Piece, to_dense

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
        self._own_head = has_head(checkpoint, spec)
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
        """ids [B, T] -> hidden [B, T, H], on the device; the table itself is not kept.

        CheckpointError for an id that the model does not have.
        """
        largest = int(token_ids.max())
        if largest >= self.spec.vocab_size:
            raise CheckpointError(
                f"{self.checkpoint.path}: the tokenizer gives the token id {largest}, and the "
                f"model has a vocabulary of {self.spec.vocab_size:,}; use the tokenizer it came "
                "with"
            )
        table = self.checkpoint.read(f"{self.spec.names.embed}.weight")
        return F.embedding(token_ids.cpu(), table).to(self.device, self.dtype)

    def layer(self, index: int) -> DenseLayer:
        return DenseLayer.read(self.checkpoint, self.spec, index, self.dtype, self.device)

    def head(self, beside: "Head | None" = None) -> "Head":
        """Read once for many batches: the table may be a gigabyte.

        A table that equals that of the head `beside` is held once.
        """
        table = self._table().to(self.device)
        if beside is not None and torch.equal(table, beside.table):
            table = beside.table
        norm = self._read(f"{self.spec.names.norm}.weight")
        return Head(norm, table, self.spec.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's hidden [..., H] -> [..., V]."""
        return self.head().logits(hidden)

    def _table(self) -> Tensor:
        """The head's [V, H]: in its own dtype where it is dense, else dequantised."""
        if not self._own_head:
            return self.checkpoint.read(f"{self.spec.names.embed}.weight")
        head = head_linear(self.spec)
        whole = Piece(head, 0, head.out_features).part(slice(0, head.in_features))
        return to_dense(head.format.read(self.checkpoint, whole))

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
