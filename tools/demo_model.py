"""The demo model for training: a small Llama in bf16, and its names in a Hugging Face checkpoint.

Knows nothing of text. Projections that read the same input are fused here and split on export.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Above this length the fused kernel wins; below, its CPU backward costs more than plain products.
_PLAIN_ATTENTION_MAX = 256


@dataclass(frozen=True)
class DemoConfig:
    """Every dimension splits over 4 ranks, rows at group boundaries of 64, columns by 16."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    max_positions: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def to_hf(self, pad_id: int, eos_id: int) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
            "torch_dtype": "bfloat16",
        }


class DemoModel(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DemoLayer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=_initial_std(name))

    def loss(self, ids: Tensor, rotary: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy at the given flat positions of ids [B, T]; rotary is [2, T, D/2]."""
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, rotary)
        # Most tokens are not the assistant's: their logits are never made.
        hidden = hidden.flatten(0, 1)[positions]
        logits = self.head(_rms_norm(hidden, self.norm, self.config.norm_eps))
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def to_hf(self) -> dict[str, Tensor]:
        config = self.config
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        state = {
            "model.embed_tokens.weight": self.embed.weight,
            "model.norm.weight": self.norm,
            "lm_head.weight": self.head.weight,
        }
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DemoLayer)
            q, k, v = torch.split(layer.qkv.weight, [query, key, key])
            gate, up = layer.gate_up.weight.chunk(2)
            projections = {
                "input_layernorm": layer.attention_norm,
                "post_attention_layernorm": layer.mlp_norm,
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": layer.o.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": layer.down.weight,
            }
            state |= {
                f"model.layers.{index}.{name}.weight": weight
                for name, weight in projections.items()
            }
        return {
            name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in state.items()
        }


class DemoLayer(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        hidden, head_dim = config.hidden_size, config.head_dim
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(
            hidden, (config.num_heads + 2 * config.num_kv_heads) * head_dim, bias=False
        )
        self.o = nn.Linear(config.num_heads * head_dim, hidden, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, hidden: Tensor, rotary: Tensor) -> Tensor:
        config = self.config
        batch, length, _ = hidden.shape
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = self.qkv(_rms_norm(hidden, self.attention_norm, config.norm_eps))
        query, key, value = (
            part.transpose(1, 2)
            for part in qkv.view(batch, length, -1, config.head_dim).split(
                (heads, kv_heads, kv_heads), 2
            )
        )
        key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
        mixed = _attend(_rotate(query, rotary), _rotate(key, rotary), value)
        hidden = hidden + self.o(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(_rms_norm(hidden, self.mlp_norm, config.norm_eps)).chunk(2, -1)
        update: Tensor = self.down(F.silu(gate) * up)
        return hidden + update


def _initial_std(name: str) -> float:
    if name == "embed.weight":
        # Words have to stay audible in the residual stream once the layers write to it: with
        # 0.03 here copying did not appear in 4 million tokens.
        return 1.0
    return 0.01 if name.endswith(("o.weight", "down.weight")) else 0.03


def rotary_table(config: DemoConfig) -> Tensor:
    """Cosines and sines, float32 [2, max_positions, head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(config.max_positions), config.rope_theta**-exponents)
    return torch.stack((angles.cos(), angles.sin()))


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def _rotate(heads: Tensor, rotary: Tensor) -> Tensor:
    """heads [B, H, T, D] turned by their positions, halves paired as in Llama."""
    cos, sin = rotary
    left, right = heads.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(heads.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over [B, H, T, D]; rows are padded on the right, so no mask is needed."""
    length = query.shape[2]
    if length > _PLAIN_ATTENTION_MAX:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    shares = scores.float().masked_fill(future, -torch.inf).softmax(-1).to(value.dtype)
    return torch.matmul(shares, value)
