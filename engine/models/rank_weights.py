"""One rank's weights from a checkpoint, by our names: read, cut, fused and packed, one at a time.

    embed                                 in the first stage
    norm, head                            in the last; head only where it is not embed as it stands
    layers.I.input_norm, .post_attention_norm, .qk_norm
    layers.I.L.weight, .bias              L: qkv, o, gate_up, down; bias where there is one

A rank reads only its part of each tensor. At most one fused linear exists twice (as stored and
as packed) at any time.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.layout import head_linear, layer_linears, layer_prefix, qkv_pieces
from engine.models.sharding import Shard
from engine.models.spec import DecoderSpec
from engine.weights.checkpoint import Checkpoint
from engine.weights.formats.dense import DenseFormat
from engine.weights.matrix import Int4Matrix, W8Matrix
from engine.weights.packed_file import Packed
from engine.weights.stored import Piece, StoredLinear, read_bias, read_weight, to_dense
from kernels.dense_linear import DenseWeight, pack_dense
from kernels.int4_linear import pack_int4
from kernels.int8_linear import has_int8_kernel, pack_int8, pack_int8_values
from kernels.stored_weight import Weight

Named = tuple[str, Packed]


def has_head(checkpoint: Checkpoint, spec: DecoderSpec) -> bool:
    """Whether the checkpoint holds a head of its own."""
    return any(name in checkpoint.tensors for name in head_linear(spec).tensors())


class RankWeights:
    """Iterating over it reads and packs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        shard: Shard,
        dtype: torch.dtype,
        device: str,
        int8_activations: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._shard = shard
        self._dtype = dtype
        self._device = device
        self._int8_activations = int8_activations

    def __iter__(self) -> Iterator[Named]:
        yield from self._tables()
        if self._shard.is_last:
            yield "norm", self._vector(f"{self._spec.names.norm}.weight")
        for layer in self._shard.layers:
            for name, value in self._layer(layer):
                yield f"layers.{layer}.{name}", value

    def _tables(self) -> Iterator[Named]:
        spec, shard, embed = self._spec, self._shard, None
        if shard.is_first:
            embed = self._vocab_rows(self._embedding())
            yield "embed", embed
        if not shard.is_last:
            return
        if has_head(self._checkpoint, spec):
            head = self._vocab_rows(head_linear(spec))
            # Some exporters store the tied matrix twice; a head that differs is its own.
            if embed is not None and spec.tie_word_embeddings and torch.equal(head, embed):
                head = embed
        else:
            head = self._vocab_rows(self._embedding()) if embed is None else embed
        # int8 where int8 rows are allowed: a bf16 head is a quarter of a small model's step.
        int8 = self._int8_activations and has_int8_kernel(self._device, self._dtype)
        packed = pack_int8(head) if int8 else pack_dense(head)
        if not isinstance(packed, DenseWeight) or packed.data is not embed:
            yield "head", packed

    def _layer(self, index: int) -> Iterator[Named]:
        spec, names, shard = self._spec, self._spec.names, self._shard
        prefix, linears = layer_prefix(spec, index), layer_linears(spec, index)
        inner = shard.inner
        attended = range(shard.heads.start * spec.head_dim, shard.heads.stop * spec.head_dim)
        qkv = qkv_pieces(spec, linears.qkv, shard.heads, shard.kv_heads)
        gate_up = [Piece(part, inner.start, inner.stop) for part in (linears.gate, linears.up)]
        yield "input_norm", self._vector(f"{prefix}{names.input_norm}.weight")
        if spec.qk_norm:
            yield "qk_norm", self._qk_norm(prefix)
        yield from self._linear("qkv", qkv, range(spec.hidden_size))
        yield from self._linear("o", [Piece(linears.o, 0, spec.hidden_size)], attended)
        yield (
            "post_attention_norm",
            self._vector(f"{prefix}{names.post_attention_norm}.weight"),
        )
        yield from self._linear("gate_up", gate_up, range(spec.hidden_size))
        yield from self._linear("down", [Piece(linears.down, 0, spec.hidden_size)], inner)

    def _linear(self, name: str, pieces: list[Piece], inputs: range) -> Iterator[Named]:
        """The pieces side by side, as one linear over the input features `inputs`."""
        yield f"{name}.weight", self._weight(pieces, slice(inputs.start, inputs.stop))
        bias = read_bias(self._checkpoint, pieces)
        if bias is not None:
            yield f"{name}.bias", self._place(bias)

    def _weight(self, pieces: list[Piece], inputs: slice) -> Weight:
        weight = read_weight(self._checkpoint, pieces, inputs, self._dtype)
        if isinstance(weight, Int4Matrix):
            return pack_int4(
                weight.q,
                weight.zeros,
                weight.scales,
                self._dtype,
                self._device,
                self._int8_activations,
                weight.input_order,
            )
        int8 = self._int8_activations and has_int8_kernel(self._device, self._dtype)
        if int8 and isinstance(weight, W8Matrix) and weight.q.dtype == torch.int8:
            return pack_int8_values(weight.q, weight.scales)
        return pack_dense(self._place(to_dense(weight)))

    def _embedding(self) -> StoredLinear:
        spec = self._spec
        name, rows, columns = spec.names.embed, spec.vocab_size, spec.hidden_size
        return StoredLinear(name, rows, columns, bias=False, format=DenseFormat())

    def _vocab_rows(self, table: StoredLinear) -> Tensor:
        """The rank's rows of a [V, H] table, zeros where they are padding."""
        ids, (vocab_size, size) = self._shard.vocab, (table.out_features, table.in_features)
        piece = Piece(table, min(ids.start, vocab_size), min(ids.stop, vocab_size))
        rows = to_dense(read_weight(self._checkpoint, [piece], slice(0, size), self._dtype))
        padding = len(ids) - rows.shape[0]
        return self._place(F.pad(rows, (0, 0, 0, padding)) if padding else rows)

    def _qk_norm(self, prefix: str) -> Tensor:
        """One row per query head, then one per key head: a single call normalises both."""
        names, shard = self._spec.names, self._shard
        q_norm = self._vector(f"{prefix}{names.q_norm}.weight")
        k_norm = self._vector(f"{prefix}{names.k_norm}.weight")
        return torch.stack([q_norm] * len(shard.heads) + [k_norm] * len(shard.kv_heads))

    def _vector(self, name: str) -> Tensor:
        return self._place(self._checkpoint.read_finite(name))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)
