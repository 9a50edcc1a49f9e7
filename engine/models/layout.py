"""Where a spec's weights lie in its checkpoint: names, shapes, and which rows are whose."""

from dataclasses import dataclass

from engine.models.spec import DecoderSpec
from engine.weights.checkpoint import ExpectedTensor
from engine.weights.formats.dense import DenseFormat
from engine.weights.formats.weight_format import WeightFormat
from engine.weights.stored import Piece, StoredLinear

# Never read. The first is derived from the config. The others are scales with which activations,
# keys and values would be rounded: activations keep 16 bits, the cache has its own quant_policy.
HARMLESS = (
    "rotary_emb.inv_freq",
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
)


@dataclass(frozen=True, slots=True)
class LayerLinears:
    """The stored linears of one layer; `qkv` holds three, or one that is grouped by kv head."""

    qkv: tuple[StoredLinear, ...]
    o: StoredLinear
    gate: StoredLinear
    up: StoredLinear
    down: StoredLinear

    def all(self) -> tuple[StoredLinear, ...]:
        return (*self.qkv, self.o, self.gate, self.up, self.down)


def layer_prefix(spec: DecoderSpec, layer: int) -> str:
    return spec.names.layer.format(layer) + "."


def layer_linears(spec: DecoderSpec, layer: int) -> LayerLinears:
    prefix, names = layer_prefix(spec, layer), spec.names
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, inner = spec.hidden_size, spec.intermediate_size

    def stored(name: str, out_features: int, in_features: int, bias: bool) -> StoredLinear:
        module = prefix + name
        return StoredLinear(module, out_features, in_features, bias, _format_of(spec, module))

    sizes = (q_size, kv_size, kv_size) if len(names.qkv) == 3 else (q_size + 2 * kv_size,)
    return LayerLinears(
        qkv=tuple(
            stored(name, size, hidden, spec.qkv_bias)
            for name, size in zip(names.qkv, sizes, strict=True)
        ),
        o=stored(names.o, hidden, q_size, spec.o_bias),
        gate=stored(names.gate, inner, hidden, spec.mlp_bias),
        up=stored(names.up, inner, hidden, spec.mlp_bias),
        down=stored(names.down, hidden, inner, spec.mlp_bias),
    )


def head_linear(spec: DecoderSpec) -> StoredLinear:
    """The head, where the checkpoint holds one of its own."""
    module = spec.names.head
    return StoredLinear(module, spec.vocab_size, spec.hidden_size, False, _format_of(spec, module))


def _format_of(spec: DecoderSpec, module: str) -> WeightFormat:
    return DenseFormat() if spec.quantization is None else spec.quantization.format_of(module)


def qkv_pieces(
    spec: DecoderSpec, qkv: tuple[StoredLinear, ...], heads: range, kv_heads: range
) -> list[Piece]:
    """The rows of query heads `heads`, then of the keys, then of the values of `kv_heads`."""
    dim = spec.head_dim
    if len(qkv) == 3:
        owners = zip(qkv, (heads, kv_heads, kv_heads), strict=True)
        return [Piece(linear, run.start * dim, run.stop * dim) for linear, run in owners]
    ratio = spec.num_heads // spec.num_kv_heads

    def row_block(kv_head: int, index: int) -> Piece:
        first = (kv_head * (ratio + 2) + index) * dim
        return Piece(qkv[0], first, first + dim)

    queries = [row_block(head // ratio, head % ratio) for head in heads]
    keys = [row_block(head, ratio) for head in kv_heads]
    values = [row_block(head, ratio + 1) for head in kv_heads]
    return queries + keys + values


def expected_tensors(spec: DecoderSpec, head: bool) -> dict[str, ExpectedTensor]:
    """Every tensor the checkpoint must hold; `head`: also one of the head's own."""
    names, hidden = spec.names, ExpectedTensor((spec.hidden_size,))
    table = ExpectedTensor((spec.vocab_size, spec.hidden_size))
    expected = {f"{names.embed}.weight": table, f"{names.norm}.weight": hidden}
    if head:
        expected |= head_linear(spec).tensors()
    for layer in range(spec.num_layers):
        prefix = layer_prefix(spec, layer)
        expected[f"{prefix}{names.input_norm}.weight"] = hidden
        expected[f"{prefix}{names.post_attention_norm}.weight"] = hidden
        if spec.qk_norm:
            for name in (names.q_norm, names.k_norm):
                expected[f"{prefix}{name}.weight"] = ExpectedTensor((spec.head_dim,))
        for linear in layer_linears(spec, layer).all():
            expected |= linear.tensors()
    return expected


def optional_tensors(spec: DecoderSpec) -> dict[str, ExpectedTensor]:
    """What it may hold besides."""
    found = head_linear(spec).optional()
    for layer in range(spec.num_layers):
        for linear in layer_linears(spec, layer).all():
            found |= linear.optional()
    return found
