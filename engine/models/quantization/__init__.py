"""How a checkpoint says that it is quantised: its settings in, a Quantization out.

One file per `quant_method`. They know settings and names of modules; layouts are
engine/weights/formats' business.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from engine.errors import CheckpointError
from engine.models.hf_config import HFConfig, read_json
from engine.models.quantization.awq import read_awq
from engine.models.quantization.bitsandbytes import read_bitsandbytes
from engine.models.quantization.compressed_tensors import read_compressed_tensors
from engine.models.quantization.fp8 import read_fp8
from engine.models.quantization.gptq import read_gptq
from engine.models.spec import Quantization

# AutoAWQ's early releases and AutoGPTQ wrote their settings beside config.json.
SIDE_FILES = ("quant_config.json", "quantize_config.json")
# compressed-tensors' own section, from before it took the common name.
SECTIONS = ("quantization_config", "compression_config")
READERS: Mapping[str, Callable[[HFConfig], Quantization]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "bitsandbytes": read_bitsandbytes,
}


def read_quantization(path: Path, config: HFConfig) -> Quantization | None:
    """The checkpoint's settings, None when its weights are dense."""
    for name in SECTIONS:
        keys = config.section(name)
        if keys.values:
            return _read(keys)
    for name in SIDE_FILES:
        if (path / name).is_file():
            keys = HFConfig(read_json(path / name), str(path / name))
            return _read(keys) if keys.values else None
    return None


def _read(keys: HFConfig) -> Quantization:
    method = _method(keys)
    if method not in READERS:
        raise CheckpointError(
            f"{keys.source}: quant_method {method!r} is not supported; allowed: "
            f"{', '.join(READERS)}. Quantise the original model anew with one of them"
        )
    return READERS[method](keys)


def _method(keys: HFConfig) -> str:
    """`quant_method`, or what a file of before that key existed must be."""
    if "quant_method" in keys:
        return str(keys.values["quant_method"]).lower()
    if "config_groups" in keys:
        return "compressed-tensors"
    if "desc_act" in keys:
        return "gptq"
    return "awq" if "zero_point" in keys else "unknown"
