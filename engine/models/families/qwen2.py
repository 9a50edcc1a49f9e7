"""Qwen2 and Qwen2.5: biases on q, k and v; optionally a sliding window on the later layers."""

from engine.models.families.common import common_spec
from engine.models.hf_config import HFConfig
from engine.models.spec import DecoderSpec

ARCHITECTURE = "Qwen2ForCausalLM"
LAYER_TYPES = ("full_attention", "sliding_attention")


def build_spec(config: HFConfig) -> DecoderSpec:
    return common_spec(
        config, architecture=ARCHITECTURE, qkv_bias=True, windows=read_windows(config)
    )


def read_windows(config: HFConfig) -> tuple[int | None, ...]:
    """Each layer's window: `layer_types` says, or layers from `max_window_layers` on have one.

    Without `use_sliding_window` there is no window, whatever `sliding_window` holds.
    """
    num_layers = config.integer("num_hidden_layers")
    window = None
    if config.flag("use_sliding_window", False):
        window = config.integer_or_null("sliding_window", 4096)
    if "layer_types" not in config:
        first = config.integer("max_window_layers", 28, minimum=0)
        return tuple(window if i >= first else None for i in range(num_layers))
    types = config.values["layer_types"]
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.error("layer_types", types, f"a list of {num_layers} entries")
    for each in types:
        if each not in LAYER_TYPES or (each == "sliding_attention" and window is None):
            allowed = " or ".join(LAYER_TYPES if window else LAYER_TYPES[:1])
            raise config.error("layer_types", each, f"{allowed} (use_sliding_window decides)")
    return tuple(window if each == "sliding_attention" else None for each in types)
