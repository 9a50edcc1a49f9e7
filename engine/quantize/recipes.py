"""Recipes: a method with its settings, and how what it makes is stored.

Where the words of the command line and of an engine config meet the methods' own.
"""

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config import Quantize
from engine.errors import CheckpointError, ConfigError
from engine.models.hf_config import HFConfig
from engine.models.quantization import read_quantization
from engine.models.spec import DecoderSpec
from engine.quantize.awq import Awq
from engine.quantize.gptq import Gptq
from engine.quantize.int8 import Int8
from engine.quantize.method import Method
from engine.quantize.output import (
    GROUP_SIZES,
    Format,
    Output,
    fitting_group_sizes,
    stored_linears,
)
from engine.quantize.prune import Pattern, Prune
from engine.quantize.rtn import Rtn
from engine.quantize.smooth_quant import SmoothQuant

COMPRESSED: Format = "compressed-tensors"
DAMPING = 0.01


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    method: Method
    output: Output
    calibrates: bool  # it needs a text

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on beside source and samples, as JSON."""
        method: Any = self.method
        return {"method": self.name, **asdict(method), "output": asdict(self.output)}


def awq(
    group_size: int,
    symmetric: bool,
    output_format: Format = "awq",
    *,
    search_scale: bool = True,
    skip: tuple[str, ...] = (),
) -> Recipe:
    method = Awq(group_size=group_size, symmetric=symmetric, search_scale=search_scale, skip=skip)
    return Recipe("awq", method, _int4(output_format, group_size, symmetric, skip), True)


def gptq(
    group_size: int,
    symmetric: bool,
    output_format: Format = "gptq",
    *,
    desc_act: bool = False,
    damping: float = DAMPING,
    skip: tuple[str, ...] = (),
) -> Recipe:
    """The largest inputs are always rounded first; with `desc_act` groups are cut in that order."""
    output = _int4(output_format, group_size, symmetric, skip, act_order=desc_act)
    method = Gptq(
        group_size=group_size,
        symmetric=symmetric,
        static_groups=not desc_act,
        damping=_damping(damping),
        skip=skip,
    )
    return Recipe("gptq", method, output, True)


def rtn(
    group_size: int,
    symmetric: bool,
    output_format: Format = "awq",
    *,
    skip: tuple[str, ...] = (),
) -> Recipe:
    method = Rtn(group_size=group_size, symmetric=symmetric, skip=skip)
    return Recipe("rtn", method, _int4(output_format, group_size, symmetric, skip), False)


def smooth_quant(
    kind: Literal["int8", "fp8"], alpha: float, *, skip: tuple[str, ...] = ()
) -> Recipe:
    output = Output(format=COMPRESSED, kind=kind, symmetric=True, skip=skip)
    method = SmoothQuant(kind=kind, alpha=alpha, skip=skip)
    return Recipe("smooth_quant", method, output, True)


def prune(
    pattern: str,
    method: Literal["wanda", "sparsegpt"],
    *,
    damping: float | None = None,
    skip: tuple[str, ...] = (),
) -> Recipe:
    if damping is not None and method == "wanda":
        raise ConfigError("--damp is SparseGPT's: leave it out, or use --method sparsegpt")
    damping = DAMPING if damping is None else _damping(damping)
    output = Output(format="dense", kind="dense", skip=skip)
    pruner = Prune(pattern=Pattern.parse(pattern), method=method, damping=damping, skip=skip)
    return Recipe("prune", pruner, output, True)


def on_load(quantize: Quantize, spec: DecoderSpec) -> Recipe:
    """The largest groups that every linear's inputs are a multiple of."""
    if quantize == "int8":
        output = Output(format=COMPRESSED, kind="int8", symmetric=True)
        return Recipe("int8", Int8(), output, False)
    sizes = fitting_group_sizes(stored_linears(spec, 0))
    if not sizes:
        linears = ", ".join(f"{each.module} {each.in_features}" for each in stored_linears(spec, 0))
        raise CheckpointError(
            f"quantize {quantize} makes groups of {', '.join(map(str, GROUP_SIZES))} inputs, and "
            f"none of them divides the inputs of all linears ({linears}); use int8"
        )
    return (awq if quantize == "awq" else rtn)(max(sizes), symmetric=False)


def quantized_spec(spec: DecoderSpec, quantize: Quantize) -> DecoderSpec:
    """What an engine loads when it quantises the checkpoint of a dense `spec`."""
    if spec.quantization is not None:
        raise ConfigError(
            f"quantize {quantize} needs a dense checkpoint, and this one is quantised already "
            f"({spec.quantization.description}); leave quantize out"
        )
    config = {"quantization_config": on_load(quantize, spec).output.quantization_config(spec)}
    keys = HFConfig(config, f"quantize {quantize}")
    return dataclasses.replace(spec, quantization=read_quantization(Path(), keys))


def _int4(
    output_format: Format,
    group_size: int,
    symmetric: bool,
    skip: tuple[str, ...],
    act_order: bool = False,
) -> Output:
    return Output(
        format=output_format,
        kind="int4",
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        skip=skip,
    )


def _damping(share: float) -> float:
    if not 0 < share < 1:
        raise ConfigError(f"--damp must be a share between 0 and 1, got {share}")
    return share
