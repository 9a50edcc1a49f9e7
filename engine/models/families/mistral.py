"""Mistral 7B and its kin: Llama without biases, with a sliding window on every layer.

v0.1 has a window of 4096, v0.2 and later write null; a config without the key means 4096.
"""

from engine.models.families.common import common_spec
from engine.models.hf_config import HFConfig
from engine.models.spec import DecoderSpec

ARCHITECTURE = "MistralForCausalLM"


def build_spec(config: HFConfig) -> DecoderSpec:
    window = config.integer_or_null("sliding_window", 4096)
    windows = (window,) * config.integer("num_hidden_layers")
    return common_spec(config, architecture=ARCHITECTURE, windows=windows)
