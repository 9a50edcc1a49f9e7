"""Writes the int4 checkpoint of the demo model from the bf16 one, and reads either back.

Usage: python -m tools.export_demo [--model DIR] [--out DIR] [--group-size G]
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.quantize.rtn import quantize_rtn
from engine.weights.awq import unpack_awq
from engine.weights.formats.awq import encode_awq
from engine.weights.matrix import Int4Matrix

COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def export_awq(model_path: Path, out: Path, group_size: int) -> None:
    """Every linear layer of the decoder in int4; embedding, norms and head stay as they are."""
    out.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    for name, weight in load_file(model_path / "model.safetensors").items():
        if _is_quantized(name):
            prefix = name.removesuffix("weight")
            encoded = encode_awq(quantize_rtn(weight, group_size))
            state |= {f"{prefix}{part}": tensor for part, tensor in encoded.items()}
        else:
            state[name] = weight
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in COPIED_FILES:
        shutil.copy(model_path / file, out / file)


def read_weights(model_path: Path) -> dict[str, Tensor]:
    """The checkpoint as a plain bf16 state dict, int4 layers dequantized."""
    stored = load_file(model_path / "model.safetensors")
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(".qweight"):
            prefix = name.removesuffix("qweight")
            q, zeros = unpack_awq(tensor, stored[f"{prefix}qzeros"])
            matrix = Int4Matrix(q, zeros, stored[f"{prefix}scales"])
            state[f"{prefix}weight"] = matrix.dequantize().to(torch.bfloat16)
        elif name.endswith("weight"):
            state[name] = tensor
    return state


def _is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--out", type=Path, default=Path("models/demo-awq"))
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()
    export_awq(arguments.model, arguments.out, arguments.group_size)


if __name__ == "__main__":
    main()
