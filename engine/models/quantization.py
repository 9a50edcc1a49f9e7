"""Which int4 format a checkpoint declares: AWQ "gemm" or none; everything else is refused."""

from pathlib import Path

from engine.errors import CheckpointError
from engine.models.hf_config import HFConfig, read_json
from engine.models.spec import AwqSpec

# AutoAWQ's early releases and AutoGPTQ wrote their settings beside config.json.
SIDE_FILES = ("quant_config.json", "quantize_config.json")


def read_quantization(path: Path, config: HFConfig) -> AwqSpec | None:
    """The checkpoint's AWQ settings, None when its weights are dense."""
    keys = config.section("quantization_config")
    for name in SIDE_FILES:
        if not keys.values and (path / name).is_file():
            keys = HFConfig(read_json(path / name), str(path / name))
    return _read_awq(keys) if keys.values else None


def _read_awq(keys: HFConfig) -> AwqSpec:
    method = _method(keys)
    if method != "awq":
        raise CheckpointError(
            f"{keys.source}: quant_method {method!r} is not supported; allowed: awq (version gemm)"
        )
    version = str(keys.values.get("version", "gemm")).lower()
    if version != "gemm":
        raise keys.error("version", keys.values["version"], "gemm, AWQ's only supported layout")
    bits = "w_bit" if "w_bit" in keys else "bits"
    if keys.integer(bits) != 4:
        raise keys.error(bits, keys.values[bits], "4")
    if not keys.flag("zero_point", True):
        raise keys.error("zero_point", False, "true: the gemm layout stores zero points")
    skipped = keys.values.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise keys.error("modules_to_not_convert", skipped, "a list of module names")
    group_size = "q_group_size" if "q_group_size" in keys else "group_size"
    return AwqSpec(group_size=keys.integer(group_size), modules_to_not_convert=tuple(skipped))


def _method(keys: HFConfig) -> str:
    """`quant_method`, or what a file of before that key existed must be."""
    if "quant_method" in keys:
        return str(keys.values["quant_method"]).lower()
    if "desc_act" in keys:
        return "gptq"
    return "awq" if "zero_point" in keys else "unknown"
