"""compressed-tensors' settings: `quant_method` "compressed-tensors".

`config_groups` say which weights have which scheme; targets and `ignore` are names of modules,
"re:" and a pattern that matches from a name's start, or a class. Of the classes that may be
targets, "Linear" alone is in a decoder. A name goes before a pattern, a pattern before the class.
"""

import re
from dataclasses import dataclass

from engine.models.hf_config import HFConfig
from engine.models.quantization.common import BITS, check_pattern, group_size, names
from engine.weights.formats.compressed_tensors import PackedFormat
from engine.weights.formats.dense import DenseFormat
from engine.weights.formats.scaled import ScaledFormat
from engine.weights.formats.weight_format import WeightFormat

PATTERN = "re:"
LINEAR = "Linear"
PACKED = "pack-quantized"
SCALED = ("int-quantized", "float-quantized", "naive-quantized")
MIXED = "mixed-precision"  # each group names its format
ACT_ORDERS = {"group": True, "dynamic": True, "weight": False, "static": False}


@dataclass(frozen=True, slots=True)
class Group:
    targets: tuple[str, ...]
    format: WeightFormat


@dataclass(frozen=True, slots=True)
class CompressedTensorsQuantization:
    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        return " and ".join(dict.fromkeys(_describe(group.format) for group in self.groups))

    def format_of(self, module: str) -> WeightFormat:
        if any(_matches(target, module) for target in self.ignore):
            return DenseFormat()
        targets = {target: group.format for group in self.groups for target in group.targets}
        # The class last; names and patterns in alphabetical order, as compressed-tensors has them.
        by_rank = sorted(targets, key=lambda t: (t == LINEAR, t.startswith(PATTERN), t))
        return next((targets[t] for t in by_rank if _matches(t, module)), DenseFormat())


def _matches(target: str, module: str) -> bool:
    if target.startswith(PATTERN):
        return re.match(target.removeprefix(PATTERN), module) is not None
    return target in (module, LINEAR)


def _describe(form: WeightFormat) -> str:
    if isinstance(form, PackedFormat):
        groups = f" in groups of {form.group_size}" if form.group_size > 0 else ""
        return f"int{form.bits}{groups}{', act-order' if form.act_order else ''}"
    return form.values if isinstance(form, ScaledFormat) else "dense"


def read_compressed_tensors(keys: HFConfig) -> CompressedTensorsQuantization:
    for key in ("sparsity_config", "transform_config"):
        section = keys.section(key)
        if section.values and section.values.get("format") != "dense":
            raise keys.error(key, section.values, "absent: its weights are not as they are used")
    groups = keys.section("config_groups")
    if not groups.values:
        raise keys.error("config_groups", groups.values, "an object of quantization schemes")
    default = keys.values.get("format")
    read = [_read_group(groups.section(name), default) for name in groups.values]
    ignore = names(keys, "ignore")
    for target in (*ignore, *(target for group in read for target in group.targets)):
        if target.startswith(PATTERN):
            check_pattern(keys, "a target", target.removeprefix(PATTERN))
    return CompressedTensorsQuantization(tuple(read), ignore)


def _read_group(keys: HFConfig, default: object) -> Group:
    targets, weights = names(keys, "targets"), keys.section("weights")
    if not targets:
        raise keys.error("targets", list(targets), "a list of module names or classes")
    if not weights.values:
        return Group(targets, DenseFormat())
    stored = keys.values.get("format") or default
    if stored == PACKED:
        return Group(targets, _read_packed(weights))
    if stored in SCALED:
        return Group(targets, _read_scaled(weights))
    allowed = f"one of {', '.join((PACKED, *SCALED))}; for {MIXED} in each group"
    raise keys.error("format", stored, allowed)


def _read_packed(weights: HFConfig) -> PackedFormat:
    bits = weights.integer("num_bits")
    if bits not in BITS:
        raise weights.error("num_bits", bits, f"one of {', '.join(map(str, BITS))}")
    weights.choice("type", ("int",), "int")
    grouped = weights.choice("strategy", ("group", "channel"), _strategy(weights)) == "group"
    return PackedFormat(
        bits=bits,
        group_size=group_size(weights, "group_size") if grouped else -1,
        symmetric=weights.flag("symmetric", True),
        act_order=_act_order(weights),
    )


def _read_scaled(weights: HFConfig) -> ScaledFormat:
    if weights.integer("num_bits") != 8:
        raise weights.error("num_bits", weights.values["num_bits"], "8")
    values = weights.choice("type", ("int", "float"), "int")
    per = weights.choice("strategy", ("channel", "tensor", "block"), _strategy(weights))
    symmetric = weights.flag("symmetric", True)
    if values == "float" and not symmetric:
        raise weights.error("symmetric", False, "true where the type is float")
    return ScaledFormat(
        values="int8" if values == "int" else "fp8",
        scale="weight_scale",
        per="channel" if per == "channel" else "tensor" if per == "tensor" else "block",
        block=read_block(weights, "block_structure") if per == "block" else (1, 1),
        symmetric=symmetric,
    )


def _strategy(weights: HFConfig) -> str:
    """What a scheme without a strategy means."""
    if "group_size" not in weights:
        return "tensor"
    return "channel" if weights.values["group_size"] == -1 else "group"


def _act_order(weights: HFConfig) -> bool:
    value = weights.values.get("actorder")
    if value is None or isinstance(value, bool):
        return bool(value)
    return ACT_ORDERS[weights.choice("actorder", tuple(ACT_ORDERS))]


def read_block(keys: HFConfig, key: str) -> tuple[int, int]:
    """Outputs and inputs of a block: [128, 128], or "128x128"."""
    value = keys.values.get(key)
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list) and len(sizes) == 2 and all(str(size).isdigit() for size in sizes):
        outputs, inputs = int(sizes[0]), int(sizes[1])
        if outputs > 0 and inputs > 0:
            return outputs, inputs
    raise keys.error(key, value, "two numbers, of outputs and inputs")
