"""bitsandbytes' settings, as transformers writes them: `quant_method` "bitsandbytes"."""

from dataclasses import dataclass

from engine.models.hf_config import HFConfig
from engine.models.quantization.common import HEADS, is_named, names, spelt
from engine.weights.formats.bitsandbytes import Bnb4Format, BnbInt8Format
from engine.weights.formats.dense import DenseFormat
from engine.weights.formats.weight_format import WeightFormat


@dataclass(frozen=True, slots=True)
class BitsAndBytesQuantization:
    format: Bnb4Format | BnbInt8Format
    skip_modules: tuple[str, ...] = HEADS

    @property
    def description(self) -> str:
        return self.format.quant_type if isinstance(self.format, Bnb4Format) else "int8"

    def format_of(self, module: str) -> WeightFormat:
        return DenseFormat() if is_named(module, self.skip_modules) else self.format


def read_bitsandbytes(keys: HFConfig) -> BitsAndBytesQuantization:
    four = keys.flag(spelt(keys, "_load_in_4bit", "load_in_4bit"), False)
    eight = keys.flag(spelt(keys, "_load_in_8bit", "load_in_8bit"), False)
    if four == eight:
        raise keys.error("load_in_4bit", four, "true, or load_in_8bit, and not both")
    skipped = names(keys, "llm_int8_skip_modules") or HEADS  # transformers' default
    if eight:
        return BitsAndBytesQuantization(BnbInt8Format(), skipped)
    keys.choice("bnb_4bit_quant_storage", ("uint8",), "uint8")
    kind = keys.choice("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
    double = keys.flag("bnb_4bit_use_double_quant", False)
    form = Bnb4Format("nf4" if kind == "nf4" else "fp4", double)
    return BitsAndBytesQuantization(form, skipped)
