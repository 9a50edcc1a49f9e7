"""Tiny random checkpoints of every family, with the transformers model they came from.

The transformers model is the oracle. Norms and biases are randomised too: with their usual ones
and zeros a decoder that forgets them would pass. `python -m tests.tiny_models DIR FAMILY` writes
one with a tokenizer and a ChatML template, which can be served.
"""

import atexit
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from engine.quantize.rtn import quantize_rtn
from engine.weights.formats.awq import encode_awq

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "internlm2")
CLASSES = {  # InternLM2's code is not part of transformers: a Llama under other names
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "internlm2": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TRAINING_LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is 12 + 30? The answer is 42.",
    "Größe, déjà vu, 你好, 🙂 and the rest of the world.",
)


@dataclass(frozen=True)
class TinyModel:
    path: Path
    reference: Any  # the transformers model, float32, eval mode

    def config(self) -> dict[str, Any]:
        values = json.loads((self.path / "config.json").read_text())
        assert isinstance(values, dict)
        return values

    def edit_config(self, **changes: Any) -> None:
        """Set keys of config.json; a value of ... removes the key."""
        values = self.config() | changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (self.path / "config.json").write_text(json.dumps(kept, indent=1))


def tiny_model(family: str, awq_group_size: int | None = None, **config: Any) -> TinyModel:
    """The model of these settings, made once per session; do not change its files."""
    return _cached(family, awq_group_size, json.dumps(config, sort_keys=True))


@cache
def _cached(family: str, awq_group_size: int | None, config: str) -> TinyModel:
    directory = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return write_tiny_model(family, directory, awq_group_size, **json.loads(config))


def copy_model(model: TinyModel, directory: Path) -> TinyModel:
    """A copy that a test may damage."""
    shutil.copytree(model.path, directory, dirs_exist_ok=True)
    return TinyModel(directory, model.reference)


def write_tiny_model(
    family: str, directory: Path, awq_group_size: int | None = None, **config: Any
) -> TinyModel:
    """Write a random checkpoint; its config is SIZES with `config` on top."""
    config_class, model_class = CLASSES[family]
    settings = SIZES | {"head_dim": 12} if family == "qwen3" else SIZES
    torch.manual_seed(0)
    reference = model_class(config_class(**(settings | config))).float().eval()
    _randomise(reference)
    directory.mkdir(parents=True, exist_ok=True)
    reference.save_pretrained(directory)
    model = TinyModel(directory, reference)
    if family == "internlm2":
        _rename_to_internlm2(model)
    if awq_group_size is not None:
        _quantize(model, awq_group_size)
    return model


@torch.no_grad()
def _randomise(reference: Any) -> None:
    """Spread the logits: with the usual small weights, greedy choices hang on rounding."""
    for name, parameter in reference.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1:
            parameter.normal_(0.0, 0.5)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, 1.0)
        else:
            parameter.normal_(0.0, 2.0 * parameter.shape[1] ** -0.5)
    reference.generation_config.pad_token_id = 0
    reference.generation_config.eos_token_id = None  # tests compare a fixed number of tokens


def _rename_to_internlm2(model: TinyModel) -> None:
    """Llama's q, k, v become rows of one wqkv, grouped by kv head; the rest changes names."""
    config = model.reference.config
    ratio = config.num_attention_heads // config.num_key_value_heads
    llama = load_file(model.path / "model.safetensors")
    renamed: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", f"model.layers.{layer}.attention."
        for kind in ("weight", "bias"):
            if f"{old}self_attn.q_proj.{kind}" in llama:
                q, k, v = (
                    llama.pop(f"{old}self_attn.{name}_proj.{kind}").unflatten(
                        0, (config.num_key_value_heads, -1)
                    )
                    for name in "qkv"
                )
                assert q.shape[1] == ratio * k.shape[1]
                renamed[f"{new}wqkv.{kind}"] = torch.cat((q, k, v), dim=1).flatten(0, 1)
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    for name, tensor in llama.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    save_file(renamed, model.path / "model.safetensors")
    model.edit_config(
        architectures=["InternLM2ForCausalLM"],
        model_type="internlm2",
        bias=config.attention_bias,
        auto_map={"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    )


@torch.no_grad()
def _quantize(model: TinyModel, group_size: int) -> None:
    """Store the layers' linears as AWQ and give the reference the dequantised weights.

    Rounding acts on each output by itself, so InternLM2's rearranged rows come out as Llama's.
    """
    stored = load_file(model.path / "model.safetensors")
    for name in [name for name in stored if "layers." in name and stored[name].dim() == 2]:
        module = name.removesuffix(".weight")
        encoded = encode_awq(quantize_rtn(stored.pop(name), group_size))
        stored |= {f"{module}.{part}": tensor for part, tensor in encoded.items()}
    save_file(stored, model.path / "model.safetensors")
    for name, parameter in model.reference.named_parameters():
        if "layers." in name and parameter.dim() == 2:
            parameter.copy_(quantize_rtn(parameter, group_size).dequantize())
    model.edit_config(
        quantization_config={
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
        }
    )


def write_tokenizer(directory: Path) -> int:
    """A byte-level BPE tokenizer with a ChatML template; returns its vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return len(fast)


def write_servable_model(family: str, directory: Path, **config: Any) -> TinyModel:
    """A tiny checkpoint with tokenizer and generation_config, as `manta serve` wants it."""
    vocab_size = write_tokenizer(directory)
    end = SPECIAL_TOKENS.index("<|im_end|>")
    settings = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": end}
    model = write_tiny_model(family, directory, **(settings | config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return model


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in FAMILIES:
        sys.exit(f"usage: python -m tests.tiny_models DIR {'|'.join(FAMILIES)}")
    write_servable_model(sys.argv[2], Path(sys.argv[1]))
