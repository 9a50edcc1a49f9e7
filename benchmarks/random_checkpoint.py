"""Random Llama-shaped checkpoints: one AWQ gemm directory and its bf16 twin.

The twin holds the dequantized values of the same 4-bit weights, so two engines that read one
each compute the same model up to bf16 rounding. Speed does not depend on the values; logits are
noise, texts are meaningless. There is no tokenizer.

    python -m benchmarks.random_checkpoint OUT [--hidden-size 1024 ...]
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.quantize.rtn import quantize_rtn
from engine.weights.formats.awq import encode_awq

INIT_STD = 0.02  # Llama's initializer_range: keeps activations near one through 24 layers


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama decoder; the defaults are the 350M shape of docs/benchmarks.md."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 64
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    group_size: int = 128  # 4-bit weights that share a scale, along the input

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of one layer's linears by checkpoint name."""
        attention = self.num_heads * self.head_dim
        key_value = self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (attention, self.hidden_size),
            "self_attn.k_proj": (key_value, self.hidden_size),
            "self_attn.v_proj": (key_value, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, attention),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }


def write_checkpoints(directory: Path, shape: LlamaShape, seed: int = 0) -> tuple[Path, Path]:
    """Write `directory`/awq and `directory`/bf16; returns both paths."""
    generator = torch.Generator().manual_seed(seed)
    awq: dict[str, Tensor] = {}
    bf16: dict[str, Tensor] = {}
    for name, tensor in _dense_tensors(shape, generator):
        awq[name] = bf16[name] = tensor
    for layer in range(shape.num_layers):
        for linear, (rows, columns) in shape.linears().items():
            name = f"model.layers.{layer}.{linear}"
            weight = torch.randn(rows, columns, generator=generator) * INIT_STD
            matrix = quantize_rtn(weight, shape.group_size)
            awq |= {f"{name}.{part}": tensor for part, tensor in encode_awq(matrix).items()}
            bf16[f"{name}.weight"] = matrix.dequantize().to(torch.bfloat16)
    return (
        _write(directory / "awq", model_config(shape, int4=True), awq),
        _write(directory / "bf16", model_config(shape, int4=False), bf16),
    )


def write_awq(directory: Path, shape: LlamaShape, seed: int = 0) -> Path:
    """Write `directory`, of random words: nothing is quantised, so that 1 GB takes seconds."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(_dense_tensors(shape, generator))
    # Nibbles spread by 4.6 around a zero of 8; times this scale, by INIT_STD.
    scale, zero_words = INIT_STD / 4.6, -0x77777778  # 0x88888888
    for layer in range(shape.num_layers):
        for linear, (rows, columns) in shape.linears().items():
            name, groups = f"model.layers.{layer}.{linear}", columns // shape.group_size
            words = torch.randint(-(2**31), 2**31, (columns, rows // 8), generator=generator)
            tensors[f"{name}.qweight"] = words.int()
            tensors[f"{name}.qzeros"] = torch.full((groups, rows // 8), zero_words).int()
            tensors[f"{name}.scales"] = torch.full((groups, rows), scale).half()
    return _write(directory, model_config(shape, int4=True), tensors)


def _dense_tensors(shape: LlamaShape, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """What stays bf16: embedding, head and norms."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * INIT_STD
        yield name, table.to(torch.bfloat16)
    ones = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    for layer in range(shape.num_layers):
        yield f"model.layers.{layer}.input_layernorm.weight", ones.clone()
        yield f"model.layers.{layer}.post_attention_layernorm.weight", ones.clone()
    yield "model.norm.weight", ones.clone()


def model_config(shape: LlamaShape, int4: bool) -> dict[str, Any]:
    """What config.json holds."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if int4:
        config["quantization_config"] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": shape.group_size,
            "zero_point": True,
        }
    return config


def _write(directory: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint in AWQ and bf16.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(LlamaShape):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    arguments = parser.parse_args()
    shape = LlamaShape(**{f.name: getattr(arguments, f.name) for f in fields(LlamaShape)})
    for path in write_checkpoints(arguments.directory, shape, arguments.seed):
        print(path)


if __name__ == "__main__":
    main()
