"""DenseLayer: one decoder layer in plain torch, whose linears a quantiser reads and replaces.

It knows the arithmetic of a layer over whole sequences. It knows no cache, no kernels, no ranks
and nothing of quantisation; a checkpoint's int4 linears are dense here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import CheckpointError
from engine.models.layout import layer_linears, layer_prefix, qkv_pieces
from engine.models.rope import rotary_table
from engine.models.spec import DecoderSpec
from engine.weights.checkpoint import Checkpoint
from engine.weights.stored import StoredLinear, read_dense
from kernels.kv_layout import dequantize_kv, quantize_kv

# The linears that share one input, in the order in which a layer computes them.
STAGES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
ROLES = tuple(role for roles in STAGES.values() for role in roles)

# Scores that attention may hold at once where torch has no fused kernel: 256 MB in float32.
MAX_SCORES = 2**26


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A pre-norm layer: RMSNorm, rotary grouped-query attention, SwiGLU.

    The mappings are the layer's own: a quantiser puts dequantised weights and folded norms into
    them, and what the layer computes from then on follows.
    """

    spec: DecoderSpec
    index: int
    weights: dict[str, Tensor]  # by role [N, K]
    biases: dict[str, Tensor]  # by role [N], of those that have one
    norms: dict[str, Tensor]  # input_norm, post_attention_norm [H]; q_norm, k_norm [D]
    kv_policy: int = 0  # the quant_policy of the cache that keys and values are read back from

    @classmethod
    def read(
        cls,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        index: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> "DenseLayer":
        """Layer `index`, dequantised; CheckpointError when a value is not finite."""

        def placed(tensor: Tensor, name: str) -> Tensor:
            return _finite(tensor, name, checkpoint).to(device, dtype)

        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for linear, rows_of in _rows_of_roles(spec, index):
            weight = placed(read_dense(checkpoint, linear), linear.module)
            bias = None
            if linear.bias:
                name = f"{linear.module}.bias"
                bias = placed(checkpoint.read(name), name)
            for role, rows in rows_of.items():
                weights[role] = _select(weight, rows)
                if bias is not None:
                    biases[role] = _select(bias, rows)
        norms = {
            key: placed(checkpoint.read(name), name)
            for key, name in norm_names(spec, index).items()
        }
        return cls(spec, index, weights, biases, norms)

    @property
    def device(self) -> torch.device:
        return self.weights["q"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["q"].dtype

    def module(self, role: str) -> str:
        """The name of the stored linear that holds the role's rows."""
        for linear, rows_of in _rows_of_roles(self.spec, self.index):
            if role in rows_of:
                return linear.module
        raise KeyError(role)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, H] of sequences from position 0 on -> the next layer's, [B, T, H]."""
        return self.add_mlp(self.add_attention(hidden))

    def add_attention(self, hidden: Tensor) -> Tensor:
        """The residual stream [B, T, H] after attention."""
        return hidden + self._linear("o", self.stage_input("o", hidden))

    def add_mlp(self, residual: Tensor) -> Tensor:
        """The residual stream [B, T, H] after the MLP, from that after attention."""
        return residual + self._linear("down", self.stage_input("down", residual))

    def stage_input(self, stage: str, stream: Tensor) -> Tensor:
        """What the stage's linears multiply, [B, T, K].

        `stream` [B, T, H] is the layer's input for qkv and o, and the residual stream after
        attention for gate_up and down.
        """
        if stage == "qkv":
            return self._norm("input_norm", stream)
        if stage == "o":
            return self._attention(self._norm("input_norm", stream))
        x = self._norm("post_attention_norm", stream)
        if stage == "gate_up":
            return x
        assert stage == "down", stage
        return F.silu(self._linear("gate", x)) * self._linear("up", x)

    def _linear(self, role: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[role], self.biases.get(role))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.norms[name], self.spec.rms_norm_eps)

    def _attention(self, x: Tensor) -> Tensor:
        """Normalised [B, T, H] -> the heads' outputs side by side, [B, T, heads * D]."""
        spec = self.spec
        batch, num_tokens, _ = x.shape
        cos, sin = rotary_table(spec.rope, spec.head_dim, num_tokens, x.dtype, str(x.device))
        q = _rotate(self._heads("q", x), cos, sin)
        k = _rotate(self._heads("k", x), cos, sin)
        v = self._heads("v", x)
        if self.kv_policy:
            k, v = (_through_cache(each, self.kv_policy) for each in (k, v))
        window = spec.windows[self.index]
        mask = None
        if window is not None and window < num_tokens:
            ones = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=x.device)
            mask = ones.tril() & ones.triu(1 - window)
        attended = torch.empty_like(q)
        step = max(1, MAX_SCORES // (spec.num_heads * num_tokens**2))
        for first in range(0, batch, step):
            part = slice(first, first + step)
            attended[part] = F.scaled_dot_product_attention(
                q[part],
                k[part],
                v[part],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=spec.num_heads != spec.num_kv_heads,
            )
        return attended.transpose(1, 2).reshape(batch, num_tokens, -1)

    def _heads(self, role: str, x: Tensor) -> Tensor:
        """[B, T, H] -> [B, heads, T, D], normalised where the model has a norm."""
        heads = self._linear(role, x).view(*x.shape[:-1], -1, self.spec.head_dim)
        if f"{role}_norm" in self.norms:
            heads = self._norm(f"{role}_norm", heads)
        return heads.transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension; half precision takes a float32 mean."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def norm_names(spec: DecoderSpec, index: int) -> dict[str, str]:
    """The tensors in the checkpoint of a layer's norms, by their keys in DenseLayer.norms."""
    prefix, names = layer_prefix(spec, index), spec.names
    found = {"input_norm": names.input_norm, "post_attention_norm": names.post_attention_norm}
    if spec.qk_norm:
        found |= {"q_norm": names.q_norm, "k_norm": names.k_norm}
    return {key: f"{prefix}{name}.weight" for key, name in found.items()}


# Which rows [N] of a stored linear are a role's; None means all, in their order.
_Rows = dict[str, Tensor | None]


def _rows_of_roles(spec: DecoderSpec, index: int) -> list[tuple[StoredLinear, _Rows]]:
    linears = layer_linears(spec, index)
    others = {"o": linears.o, "gate": linears.gate, "up": linears.up, "down": linears.down}
    found: list[tuple[StoredLinear, _Rows]] = [
        (linear, {role: None}) for role, linear in others.items()
    ]
    if len(linears.qkv) == 1:
        return [(linears.qkv[0], _grouped_rows(spec, linears.qkv)), *found]
    for role, linear in zip(STAGES["qkv"], linears.qkv, strict=True):
        found.append((linear, {role: None}))
    return found


def _grouped_rows(spec: DecoderSpec, qkv: tuple[StoredLinear, ...]) -> _Rows:
    pieces = qkv_pieces(spec, qkv, range(spec.num_heads), range(spec.num_kv_heads))
    counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    rows: _Rows = {}
    for role, count in zip(STAGES["qkv"], counts, strict=True):
        own, pieces = pieces[:count], pieces[count:]
        rows[role] = torch.cat([torch.arange(piece.start, piece.stop) for piece in own])
    return rows


def _select(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows.to(tensor.device)]


def _finite(tensor: Tensor, name: str, checkpoint: Checkpoint) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{checkpoint.path}: {name} holds {count} values that are NaN or infinite; such a "
            "model computes nothing, so get its files again"
        )
    return tensor


def _through_cache(x: Tensor, policy: int) -> Tensor:
    """Keys or values [B, heads, T, D] as a quantised cache gives them back."""
    return dequantize_kv(*quantize_kv(x, policy), policy).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): [B, heads, T, D] with tables [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
