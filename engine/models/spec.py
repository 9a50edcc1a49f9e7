"""DecoderSpec: what one decoder is made of, as frozen values a family file fills in.

It knows shapes, options and checkpoint names; nothing about files, tensors or ranks.
"""

from dataclasses import dataclass, field
from typing import Protocol

from engine.models.rope import Rope
from engine.weights.formats.weight_format import WeightFormat


class Quantization(Protocol):
    """Which module of a checkpoint is stored in which format. Its repr tells it from any other."""

    @property
    def description(self) -> str:
        """For people: "int4 in groups of 128"."""

    def format_of(self, module: str) -> WeightFormat:
        """Of the linear of this name, as the checkpoint names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """Module names in the checkpoint; those of a layer follow `layer`, which takes its index.

    `qkv` has three names, or one when q, k and v are rows of one matrix, grouped by kv head:
    for each kv head its query heads, then its key head, then its value head.
    """

    embed: str = "model.embed_tokens"
    layer: str = "model.layers.{}"
    norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"
    qkv: tuple[str, str, str] | tuple[str] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    )
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A pre-norm decoder: RMSNorm, rotary GQA attention, SwiGLU.

    `windows[i]` is the sliding window of layer i in tokens, the query's own included; None
    means the whole context.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"  # of the checkpoint's dense tensors, as its config says
    quantization: Quantization | None = None  # None: every linear is dense
    names: WeightNames = field(default_factory=WeightNames)
