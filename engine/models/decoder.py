"""Decoder: the forward pass of every family, over flat tokens and a paged KV cache.

Pre-norm transformer (arXiv 2302.13971): each layer adds attention(norm(x)), then MLP(norm(x)), to
the residual stream. The T tokens of a step may belong to many sequences; only attention knows
which, through its metadata. Weights come from engine/models/loader.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kv_cache import KVCache
from engine.models.linear import (
    GatedLinear,
    Linear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from kernels.attention import AttentionMetadata, paged_attention
from kernels.gpu.step import GpuStep
from kernels.kv_layout import LayerCache
from kernels.norm import add_rms_norm
from kernels.partials import Partials, summed
from kernels.rope import RotaryTable, rope_and_store


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with rotary positions; the heads are this rank's."""

    qkv: Linear
    o: RowParallelLinear
    qk_norm: Tensor | None  # [heads + kv heads, D]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    eps: float

    def __call__(
        self,
        hidden: Tensor,
        rotary: RotaryTable,
        positions: Tensor,
        meta: AttentionMetadata | GpuStep,
        cache: LayerCache,
    ) -> Tensor | Partials:
        q = rope_and_store(
            self.qkv(hidden, partial=True),
            self.qk_norm,
            self.eps,
            rotary,
            positions,
            cache,
            meta,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
        )
        attended = paged_attention(q, cache, meta, self.head_dim**-0.5, self.window)
        return self.o(attended.view(-1, self.num_heads * self.head_dim))


@dataclass(frozen=True, slots=True)
class MLP:
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    gate_up: GatedLinear
    down: RowParallelLinear

    def __call__(self, hidden: Tensor) -> Tensor | Partials:
        return self.down(self.gate_up(hidden))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    input_norm: Tensor  # [H]
    attention: Attention
    post_attention_norm: Tensor  # [H]
    mlp: MLP


@dataclass(frozen=True, slots=True)
class Decoder:
    """The layers of one stage; the first one embeds, the last one has the final norm and the head.

    Alone, a stage is both.
    """

    embed: VocabParallelEmbedding | None
    layers: tuple[DecoderLayer, ...]
    norm: Tensor | None  # [H]
    head: VocabParallelHead | None
    rotary: RotaryTable
    eps: float

    @torch.inference_mode()
    def forward(
        self,
        inputs: Tensor,
        positions: Tensor,
        meta: AttentionMetadata | GpuStep,
        kv_cache: KVCache,
    ) -> Tensor:
        """Token ids [T] -> hidden [T, H], normalised; fills the KV cache.

        Further stages take the hidden [T, H] of the one before, which only the last one
        normalises. Ids and positions [T] are int64, in a GpuStep int32.
        """
        added: Tensor | Partials = inputs if self.embed is None else self.embed(inputs)
        residual: Tensor | None = None
        for layer, cache in zip(self.layers, kv_cache.layers, strict=True):
            hidden, residual = add_rms_norm(added, residual, layer.input_norm, self.eps)
            added = layer.attention(hidden, self.rotary, positions, meta, cache)
            hidden, residual = add_rms_norm(added, residual, layer.post_attention_norm, self.eps)
            added = layer.mlp(hidden)
        assert residual is not None, "a stage has layers"
        if self.norm is None:
            return residual + summed(added)
        return add_rms_norm(added, residual, self.norm, self.eps)[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor | None:
        """hidden [L, H] of the last stage -> [L, V] on its rank 0, None on the others."""
        assert self.head is not None, "the last stage has the head"
        return self.head(hidden)
