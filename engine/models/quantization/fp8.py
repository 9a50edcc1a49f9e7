"""FP8 settings: DeepSeek-V3's and Qwen3's block scales, AutoFP8's one scale per tensor.

`quant_method` "fp8". `activation_scheme` says how activations would be rounded; here they keep 16
bits.
"""

from dataclasses import dataclass

from engine.models.hf_config import HFConfig
from engine.models.quantization.common import HEADS, is_named, names, spelt
from engine.models.quantization.compressed_tensors import read_block
from engine.weights.formats.dense import DenseFormat
from engine.weights.formats.scaled import ScaledFormat
from engine.weights.formats.weight_format import WeightFormat

BLOCK_KEY = "weight_block_size"


@dataclass(frozen=True, slots=True)
class Fp8Quantization:
    format: ScaledFormat
    modules_to_not_convert: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        a, b = self.format.block
        return f"fp8 in blocks of {a} x {b}" if self.format.per == "block" else "fp8"

    def format_of(self, module: str) -> WeightFormat:
        skipped = module in HEADS or is_named(module, self.modules_to_not_convert)
        return DenseFormat() if skipped else self.format


def read_fp8(keys: HFConfig) -> Fp8Quantization:
    keys.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    skipped = names(keys, spelt(keys, "ignored_layers", "modules_to_not_convert"))
    if BLOCK_KEY in keys:
        block = read_block(keys, BLOCK_KEY)
        return Fp8Quantization(ScaledFormat("fp8", "weight_scale_inv", "block", block), skipped)
    # transformers writes the key, as null; AutoFP8 does not know it.
    scale = "weight_scale_inv" if BLOCK_KEY in keys.values else "weight_scale"
    return Fp8Quantization(ScaledFormat("fp8", scale, "tensor"), skipped)
