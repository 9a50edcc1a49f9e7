"""From a checkpoint directory to its DecoderSpec, and the dtype the engine computes in."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from engine.errors import CheckpointError, ConfigError
from engine.models.families import internlm2, llama, mistral, qwen2, qwen3
from engine.models.hf_config import HFConfig, read_json
from engine.models.quantization import read_quantization
from engine.models.spec import DecoderSpec

FAMILIES: dict[str, Callable[[HFConfig], DecoderSpec]] = {
    family.ARCHITECTURE: family.build_spec for family in (llama, mistral, qwen2, qwen3, internlm2)
}


def load_spec(path: str | Path) -> DecoderSpec:
    """The spec of a Hugging Face checkpoint directory; CheckpointError when it cannot be served."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give a local checkpoint directory")
    config = HFConfig(read_json(path / "config.json"), str(path / "config.json"))
    spec = _build_spec(config)
    return replace(spec, quantization=read_quantization(path, config))


def resolve_dtype(requested: str, spec: DecoderSpec, device: str) -> torch.dtype:
    """`auto` takes the checkpoint's dtype, with bfloat16 for float16 on the CPU.

    float32 is the exact mode: int4 weights are dequantised and multiplied in float32.
    """
    name = spec.dtype if requested == "auto" else requested
    if device == "cpu" and name == "float16":
        if requested != "auto":
            raise ConfigError("dtype float16 needs a GPU; on the CPU use bfloat16 or float32")
        name = "bfloat16"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _build_spec(config: HFConfig) -> DecoderSpec:
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise config.error("architectures", names, "a list naming the model's class")
    if names[0] not in FAMILIES:
        remote = " (the checkpoint's own code is never run)" if "auto_map" in config else ""
        raise CheckpointError(
            f"{config.source}: architecture {names[0]!r} is not supported{remote}; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[names[0]](config)
