"""What every family's config spells the same way."""

from engine.errors import CheckpointError
from engine.models.families.rope_keys import read_rope
from engine.models.hf_config import HFConfig
from engine.models.spec import DecoderSpec, WeightNames

DTYPES = ("bfloat16", "float16", "float32")


def common_spec(
    config: HFConfig,
    *,
    architecture: str,
    windows: tuple[int | None, ...] | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    names: WeightNames | None = None,
) -> DecoderSpec:
    """A spec from the common keys and what the family decided.

    `head_dim` is the family's default (hidden_size / num_attention_heads without one), `windows`
    defaults to the whole context everywhere.
    """
    config.choice("hidden_act", ("silu",), "silu")
    num_layers = config.integer("num_hidden_layers")
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    spec = DecoderSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=config.integer("head_dim", head_dim or hidden_size // num_heads),
        max_position_embeddings=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        windows=windows or (None,) * num_layers,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        dtype=config.choice("dtype" if "dtype" in config else "torch_dtype", DTYPES, "bfloat16"),
        names=names or WeightNames(),
    )
    _check(spec, config.source)
    return spec


def _check(spec: DecoderSpec, source: str) -> None:
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"{source}: num_attention_heads ({spec.num_heads}) must be a multiple of "
            f"num_key_value_heads ({spec.num_kv_heads})"
        )
    if spec.head_dim % 2:
        raise CheckpointError(
            f"{source}: head_dim must be even, RoPE rotates pairs of values; got {spec.head_dim}"
        )
