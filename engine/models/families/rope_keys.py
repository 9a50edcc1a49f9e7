"""RoPE settings out of a config, in both spellings the field uses.

transformers 5 writes `rope_parameters` (rope_theta inside), earlier versions `rope_scaling`
beside a top-level `rope_theta`, the oldest with `type` for `rope_type`. Precedence and defaults
are transformers' own.
"""

import math

from engine.models.hf_config import HFConfig
from engine.models.rope import DefaultRope, DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(config: HFConfig) -> Rope:
    keys = config.section("rope_scaling")
    if not keys.values:
        keys = config.section("rope_parameters")
    nested = [key for key, value in keys.values.items() if isinstance(value, dict)]
    if nested:
        raise keys.error(nested[0], keys.values[nested[0]], "a value: one RoPE for all layers")
    for place in (keys, config):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            found = place.values["partial_rotary_factor"]
            raise place.error("partial_rotary_factor", found, "1.0 for this architecture")
    spelling = "rope_type" if "rope_type" in keys else "type"
    theta = keys.number("rope_theta", config.number("rope_theta", 10_000.0))
    match keys.choice(spelling, ROPE_TYPES, "default"):
        case "linear":
            return LinearRope(theta=theta, factor=keys.number("factor"))
        case "dynamic":
            return DynamicRope(
                theta=theta,
                factor=keys.number("factor"),
                max_position_embeddings=config.integer("max_position_embeddings"),
            )
        case "llama3":
            return Llama3Rope(
                theta=theta,
                factor=keys.number("factor"),
                low_freq_factor=keys.number("low_freq_factor"),
                high_freq_factor=keys.number("high_freq_factor"),
                original_max_position_embeddings=_trained_length(config, keys),
            )
        case "yarn":
            return _read_yarn(config, keys, theta)
    return DefaultRope(theta=theta)


def _read_yarn(config: HFConfig, keys: HFConfig, theta: float) -> YarnRope:
    trained = _trained_length(config, keys)
    factor = keys.number("factor", config.integer("max_position_embeddings") / trained)
    if "attention_factor" in keys:
        attention_factor = keys.number("attention_factor")
    elif "mscale" in keys and "mscale_all_dim" in keys:
        numerator = _temperature(factor, keys.number("mscale"))
        attention_factor = numerator / _temperature(factor, keys.number("mscale_all_dim"))
    else:
        attention_factor = _temperature(factor, 1.0)
    return YarnRope(
        theta=theta,
        factor=factor,
        original_max_position_embeddings=trained,
        attention_factor=attention_factor,
        beta_fast=keys.number("beta_fast", 32.0),
        beta_slow=keys.number("beta_slow", 1.0),
        truncate=keys.flag("truncate", True),
    )


def _temperature(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _trained_length(config: HFConfig, keys: HFConfig) -> int:
    """The context before scaling; transformers lets a top-level key win."""
    key = "original_max_position_embeddings"
    if key in config:
        return config.integer(key)
    return keys.integer(key, config.integer("max_position_embeddings"))
