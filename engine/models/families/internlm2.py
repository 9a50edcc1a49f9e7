"""InternLM2 and 2.5: Llama under other names, with q, k and v in one matrix.

Its checkpoints carry remote code (`auto_map`), which is never run: this file is enough.
"""

from engine.models.families.common import common_spec
from engine.models.hf_config import HFConfig
from engine.models.spec import DecoderSpec, WeightNames

ARCHITECTURE = "InternLM2ForCausalLM"

NAMES = WeightNames(
    embed="model.tok_embeddings",
    head="output",
    input_norm="attention_norm",
    post_attention_norm="ffn_norm",
    qkv=("attention.wqkv",),
    o="attention.wo",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
)


def build_spec(config: HFConfig) -> DecoderSpec:
    bias = config.flag("bias", True)
    return common_spec(config, architecture=ARCHITECTURE, qkv_bias=bias, o_bias=bias, names=NAMES)
