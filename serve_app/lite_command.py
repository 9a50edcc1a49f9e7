"""The commands of `manta lite`: from their options to a job, its report and a summary."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.quantize import recipes
from engine.quantize.calibration import TokenSamples, samples
from engine.quantize.job import CalibrationStates, JobRecord, LocalStates, QuantizationJob
from engine.quantize.method import Method
from engine.quantize.recipes import Recipe
from engine.quantize.source import Source
from engine.rank_model import resolve_device, tensor_device
from engine.tokenizer import Tokenizer

SEQLEN = 2048

Options = dict[str, Any]


def run_quantization(name: str, options: Options) -> None:
    """Any of the commands that write a checkpoint; `options` by the names of their parameters."""
    recipe = _recipe(name, options)
    source = Source.open(Path(options["model"]).expanduser())
    text = _text(source, recipe, options)
    device = _device(options)
    with ExitStack() as stack:
        states, method = _workers(stack, source, recipe, options, device)
        QuantizationJob(
            source=source,
            work_dir=options["work_dir"],
            method=method,
            output=recipe.output,
            settings=recipe.settings,
            samples=text.calibration if text is not None and recipe.calibrates else None,
            states=states,
            device=device,
            dtype=getattr(torch, options.get("dtype", "float32")),
            restart=options["restart"],
            overwrite=options["overwrite"],
            finish=partial(_report, recipe, source, text, options, device),
        ).run()


def _recipe(name: str, options: Options) -> Recipe:
    skip = tuple(options["skip"] or ())
    if name == "smooth_quant":
        return recipes.smooth_quant(options["quant_dtype"], options["alpha"], skip=skip)
    if name == "prune":
        return recipes.prune(options["pattern"], options["method"], skip=skip)
    if options["w_bits"] != 4:
        raise ConfigError(
            f"--w-bits {options['w_bits']} cannot be made, 4 can; for 8 bits use "
            "`manta lite smooth_quant`"
        )
    groups = options["w_group_size"], options["w_sym"], options["output_format"]
    if name == "awq":
        return recipes.awq(*groups, search_scale=options["search_scale"], skip=skip)
    if name == "gptq":
        damping, desc_act = options["damp"], options["desc_act"]
        return recipes.gptq(*groups, desc_act=desc_act, damping=damping, skip=skip)
    return recipes.rtn(*groups, skip=skip)
