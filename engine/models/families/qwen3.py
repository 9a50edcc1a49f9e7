"""Qwen3 (dense): RMSNorm on each head's q and k, an explicit head size, optional biases."""

from engine.models.families.common import common_spec
from engine.models.families.qwen2 import read_windows
from engine.models.hf_config import HFConfig
from engine.models.spec import DecoderSpec

ARCHITECTURE = "Qwen3ForCausalLM"


def build_spec(config: HFConfig) -> DecoderSpec:
    attention_bias = config.flag("attention_bias", False)
    return common_spec(
        config,
        architecture=ARCHITECTURE,
        head_dim=128,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        windows=read_windows(config),
    )
