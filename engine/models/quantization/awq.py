"""AutoAWQ's settings, and LMDeploy's: `quant_method` "awq"."""

from dataclasses import dataclass
from typing import Literal

from engine.models.hf_config import HFConfig
from engine.models.quantization.common import HEADS, group_size, names, spelt
from engine.weights.formats.awq import GEMV_GROUPS, AwqGemmFormat, AwqGemvFormat
from engine.weights.formats.dense import DenseFormat
from engine.weights.formats.weight_format import WeightFormat

VERSIONS = ("gemm", "gemv")


@dataclass(frozen=True, slots=True)
class AwqQuantization:
    group_size: int
    version: Literal["gemm", "gemv"] = "gemm"
    modules_to_not_convert: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        return f"int4 in groups of {self.group_size}" if self.group_size > 0 else "int4"

    def format_of(self, module: str) -> WeightFormat:
        # AutoAWQ quantises the layers alone, and skips what has a name anywhere in its own.
        if module in HEADS or any(part in module for part in self.modules_to_not_convert):
            return DenseFormat()
        if self.version == "gemv":
            return AwqGemvFormat(self.group_size)
        return AwqGemmFormat(self.group_size)


def read_awq(keys: HFConfig) -> AwqQuantization:
    key = spelt(keys, "checkpoint_format", "format", "version")
    version = str(keys.values.get(key) or "gemm").lower()
    if version not in VERSIONS:
        raise keys.error(key, keys.values[key], f"one of {', '.join(VERSIONS)}")
    bits = spelt(keys, "w_bit", "bits")
    if keys.integer(bits) != 4:
        raise keys.error(bits, keys.values[bits], "4")
    if not keys.flag("zero_point", True):
        raise keys.error("zero_point", False, "true: AWQ's layouts store zero points")
    key = spelt(keys, "q_group_size", "group_size")
    size = group_size(keys, key)
    if version == "gemv" and size not in GEMV_GROUPS and (size < 128 or size % 128):
        raise keys.error(key, size, "32, 64 or a multiple of 128, which gemv has a layout for")
    skipped = names(keys, "modules_to_not_convert")
    return AwqQuantization(size, "gemv" if version == "gemv" else "gemm", skipped)
