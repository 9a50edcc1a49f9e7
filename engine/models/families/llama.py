"""Llama 1, 2 and 3.x, and what shares its config: Code Llama, Yi, TinyLlama, many fine-tunes."""

from engine.models.families.common import common_spec
from engine.models.hf_config import HFConfig
from engine.models.spec import DecoderSpec

ARCHITECTURE = "LlamaForCausalLM"


def build_spec(config: HFConfig) -> DecoderSpec:
    attention_bias = config.flag("attention_bias", False)
    return common_spec(
        config,
        architecture=ARCHITECTURE,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
