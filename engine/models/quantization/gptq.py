"""AutoGPTQ's and GPTQModel's settings: `quant_method` "gptq"."""

import re
from dataclasses import dataclass, replace

from engine.models.hf_config import HFConfig
from engine.models.quantization.common import BITS, HEADS, check_pattern, group_size, spelt
from engine.weights.formats.dense import DenseFormat
from engine.weights.formats.gptq import GptqFormat
from engine.weights.formats.weight_format import WeightFormat

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class Override:
    """Of the modules that `pattern` matches from their start; without a format they are dense."""

    pattern: str
    format: GptqFormat | None


@dataclass(frozen=True, slots=True)
class GptqQuantization:
    format: GptqFormat
    dynamic: tuple[Override, ...] = ()
    modules_in_block: tuple[str, ...] | None = None  # None: all
    lm_head: bool = False

    @property
    def description(self) -> str:
        form, order = self.format, ", act-order" if self.format.act_order else ""
        groups = f" in groups of {form.group_size}" if form.group_size > 0 else ""
        return f"int{form.bits}{groups}{order}"

    def format_of(self, module: str) -> WeightFormat:
        if module in HEADS:
            return self.format if self.lm_head else DenseFormat()
        for override in self.dynamic:
            if re.match(override.pattern, module):
                return override.format or DenseFormat()
        inside = self.modules_in_block
        if inside is not None and not any(f".{module}".endswith(f".{name}") for name in inside):
            return DenseFormat()
        return self.format


def read_gptq(keys: HFConfig) -> GptqQuantization:
    key = spelt(keys, "checkpoint_format", "format")
    version = str(keys.values.get(key) or "gptq").lower()
    if version not in ZERO_OFFSETS:
        raise keys.error(key, keys.values[key], f"one of {', '.join(ZERO_OFFSETS)}")
    default = GptqFormat(
        bits=_bits(keys, spelt(keys, "w_bit", "bits")),
        group_size=group_size(keys, spelt(keys, "q_group_size", "group_size")),
        act_order=keys.flag("desc_act", False),
        zero_offset=ZERO_OFFSETS[version],
    )
    keys.flag("sym", True)  # the zeros are stored either way
    return GptqQuantization(
        format=default,
        dynamic=_read_dynamic(keys, default),
        modules_in_block=_modules_in_block(keys),
        lm_head=keys.flag("lm_head", False),
    )


def _bits(keys: HFConfig, key: str) -> int:
    bits = keys.integer(key)
    if bits not in BITS:
        raise keys.error(key, bits, f"one of {', '.join(map(str, BITS))}")
    return bits


def _read_dynamic(keys: HFConfig, default: GptqFormat) -> tuple[Override, ...]:
    """Patterns in their order: the first that matches decides."""
    section = keys.section("dynamic")
    return tuple(_read_override(section, pattern, default) for pattern in section.values)


def _read_override(dynamic: HFConfig, key: str, default: GptqFormat) -> Override:
    skips = key.startswith("-:")
    pattern = check_pattern(dynamic, key, key.removeprefix("-:").removeprefix("+:"))
    if skips:
        return Override(pattern, None)
    keys, form = dynamic.section(key), default
    bits = spelt(keys, "w_bit", "bits")
    if bits in keys:
        form = replace(form, bits=_bits(keys, bits))
    size = spelt(keys, "q_group_size", "group_size")
    if size in keys:
        form = replace(form, group_size=group_size(keys, size))
    keys.flag("sym", True)
    return Override(pattern, replace(form, act_order=keys.flag("desc_act", form.act_order)))


def _modules_in_block(keys: HFConfig) -> tuple[str, ...] | None:
    """Lists of names, or lists of lists: those that are quantised together."""
    key = spelt(keys, "inside_layer_modules", "modules_in_block_to_quantize")
    if key not in keys:
        return None
    value = keys.values[key]
    found: list[object] = []
    for entry in value if isinstance(value, list) else [None]:
        found += entry if isinstance(entry, list) else [entry]
    inside = tuple(name for name in found if isinstance(name, str))
    if not inside or len(inside) < len(found):
        raise keys.error(key, value, "a list of lists of module names")
    return inside
