"""load_decoder: one rank's Decoder from a checkpoint, read tensor by tensor.

A rank reads only its part of each tensor. At most one fused linear exists twice (as stored and
as packed) at any time.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.decoder import MLP, Attention, Decoder, DecoderLayer
from engine.models.layout import (
    HARMLESS,
    expected_tensors,
    layer_linears,
    layer_prefix,
    qkv_pieces,
)
from engine.models.linear import (
    Linear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from engine.models.rope import rotary_table
from engine.models.sharding import Shard, check_tp
from engine.models.spec import DecoderSpec
from engine.parallel import ParallelGroup
from engine.weights.checkpoint import Checkpoint
from engine.weights.stored import Int4Matrix, Piece, StoredLinear, read_bias, read_weight
from kernels.dense_linear import DenseWeight, pack_dense
from kernels.int4_linear import Int4Weight, pack_int4
from kernels.int8_linear import has_int8_kernel, pack_int8
from kernels.rope import signed_sin


def load_decoder(
    path: str | Path,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype,
    device: str,
    group: ParallelGroup,
    int8_activations: bool = False,
    session_len: int | None = None,
) -> Decoder:
    """Read, check, cut and pack the weights of `group.rank`.

    `session_len` is the number of positions to prepare; None: max_position_embeddings.
    """
    check_tp(spec, group.size)
    session_len = session_len or spec.max_position_embeddings
    head_name = f"{spec.names.head}.weight"
    with Checkpoint(Path(path)) as checkpoint:
        own_head = not spec.tie_word_embeddings or head_name in checkpoint.tensors
        checkpoint.verify(expected_tensors(spec, head=own_head), HARMLESS)
        loader = _Loader(checkpoint, spec, group, dtype, device, int8_activations)
        embed = loader.vocab_rows(f"{spec.names.embed}.weight")
        # Some exporters store the tied matrix twice; a head that differs is a head of its own.
        head = loader.vocab_rows(head_name) if own_head else embed
        if spec.tie_word_embeddings and torch.equal(head, embed):
            head = embed
        layers = tuple(loader.layer(i, session_len) for i in range(spec.num_layers))
        norm = loader.vector(f"{spec.names.norm}.weight")
    cos, sin = rotary_table(spec.rope, spec.head_dim, session_len, dtype, device)
    return Decoder(
        embed=VocabParallelEmbedding(embed, loader.shard.vocab.start, group),
        layers=layers,
        norm=norm,
        head=VocabParallelHead(loader.head_linear(head), spec.vocab_size, group),
        cos=cos,
        sin=signed_sin(sin),
        eps=spec.rms_norm_eps,
    )


class _Loader:
    """Turns stored tensors into this rank's layers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        group: ParallelGroup,
        dtype: torch.dtype,
        device: str,
        int8_activations: bool,
    ) -> None:
        self.shard = Shard.of(spec, group.rank, group.size)
        self._checkpoint = checkpoint
        self._spec = spec
        self._group = group
        self._dtype = dtype
        self._device = device
        self._int8_activations = int8_activations

    def vocab_rows(self, name: str) -> Tensor:
        """The rank's rows of a [V, H] table, zeros where they are padding."""
        ids, vocab_size = self.shard.vocab, self._spec.vocab_size
        rows = self._checkpoint.read(name, slice(min(ids.start, vocab_size), ids.stop))
        padding = len(ids) - rows.shape[0]
        return self._place(F.pad(rows, (0, 0, 0, padding)) if padding else rows)

    def head_linear(self, rows: Tensor) -> Linear:
        """int8 where int8 rows are allowed: a bf16 head is a quarter of a small model's step."""
        int8 = self._int8_activations and has_int8_kernel(self._device, self._dtype)
        return Linear(pack_int8(rows) if int8 else pack_dense(rows))

    def vector(self, name: str) -> Tensor:
        return self._place(self._checkpoint.read(name))

    def layer(self, index: int, session_len: int) -> DecoderLayer:
        names, inner = self._spec.names, self.shard.inner
        prefix, linears = layer_prefix(self._spec, index), layer_linears(self._spec, index)
        gate = Piece(linears.gate, inner.start, inner.stop)
        up = Piece(linears.up, inner.start, inner.stop)
        return DecoderLayer(
            input_norm=self.vector(f"{prefix}{names.input_norm}.weight"),
            attention=self._attention(index, session_len),
            post_attention_norm=self.vector(f"{prefix}{names.post_attention_norm}.weight"),
            mlp=MLP(
                gate_up=self._column_parallel([gate, up]),
                down=self._row_parallel(linears.down, inner),
            ),
        )

    def _attention(self, index: int, session_len: int) -> Attention:
        spec, heads, kv_heads = self._spec, self.shard.heads, self.shard.kv_heads
        prefix, linears = layer_prefix(spec, index), layer_linears(spec, index)
        window = spec.windows[index]
        return Attention(
            qkv=self._column_parallel(qkv_pieces(spec, linears.qkv, heads, kv_heads)),
            o=self._row_parallel(
                linears.o, range(heads.start * spec.head_dim, heads.stop * spec.head_dim)
            ),
            qk_norm=self._qk_norm(prefix) if spec.qk_norm else None,
            num_heads=len(heads),
            num_kv_heads=len(kv_heads),
            head_dim=spec.head_dim,
            # A window that no sequence can outgrow would only cost a mask.
            window=window if window is not None and window < session_len else None,
            eps=spec.rms_norm_eps,
        )

    def _qk_norm(self, prefix: str) -> Tensor:
        """One row per query head, then one per key head: a single call normalises both."""
        names, shard = self._spec.names, self.shard
        q_norm = self.vector(f"{prefix}{names.q_norm}.weight")
        k_norm = self.vector(f"{prefix}{names.k_norm}.weight")
        return torch.stack([q_norm] * len(shard.heads) + [k_norm] * len(shard.kv_heads))

    def _column_parallel(self, pieces: list[Piece]) -> Linear:
        """The pieces side by side, as one linear."""
        bias = read_bias(self._checkpoint, pieces)
        weight = self._weight(pieces, range(pieces[0].stored.in_features))
        return Linear(weight, None if bias is None else self._place(bias))

    def _row_parallel(self, stored: StoredLinear, inputs: range) -> RowParallelLinear:
        whole = [Piece(stored, 0, stored.out_features)]
        weight, bias = self._weight(whole, inputs), read_bias(self._checkpoint, whole)
        bias = None if bias is None else self._place(bias)
        if self._group.size == 1:  # nothing to sum: the linear adds its bias itself
            return RowParallelLinear(Linear(weight, bias), None, self._group)
        return RowParallelLinear(Linear(weight), bias, self._group)

    def _weight(self, pieces: list[Piece], inputs: range) -> DenseWeight | Int4Weight:
        part = slice(inputs.start, inputs.stop)
        weight = read_weight(self._checkpoint, pieces, part, self._dtype)
        if isinstance(weight, Int4Matrix):
            return pack_int4(
                weight.q,
                weight.zeros,
                weight.scales,
                self._dtype,
                self._device,
                self._int8_activations,
            )
        return pack_dense(self._place(weight))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)
