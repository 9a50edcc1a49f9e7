"""`manta lite` commands that write a checkpoint: from options to a job, its report, a summary."""

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from engine.errors import ConfigError
from engine.quantize import recipes
from engine.quantize.calibration import TokenSamples
from engine.quantize.evaluation import evaluate
from engine.quantize.files import human
from engine.quantize.job import CalibrationStates, JobRecord, LocalStates, QuantizationJob
from engine.quantize.method import Method
from engine.quantize.recipes import Recipe
from engine.quantize.report import Report, Result, Setting, write_report
from engine.quantize.source import Source, peak_memory
from serve_app.lite_measure import (
    Options,
    device_of,
    expanded,
    progress_bar,
    say_results,
    text_of,
    with_work_dir,
)


def run_quantization(name: str, options: Options) -> None:
    """Any of the commands that write a checkpoint; `options` by the names of their parameters."""
    recipe, options = _recipe(name, options), with_work_dir(options)
    source = Source.open(expanded(options["model"]))
    text = _text(source, recipe, options)
    device = device_of(options)
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
    typer.echo(f"manta serve {options['work_dir']}")


def _recipe(name: str, options: Options) -> Recipe:
    skip = tuple(options["skip"] or ())
    if name == "smooth_quant":
        return recipes.smooth_quant(options["quant_dtype"], options["alpha"], skip=skip)
    if name == "prune":
        return recipes.prune(
            options["pattern"], options["method"], damping=options["damp"], skip=skip
        )
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


def _text(source: Source, recipe: Recipe, options: Options) -> TokenSamples | None:
    """What is calibrated or measured on; None when nothing is."""
    if not recipe.calibrates and not options["evaluate"]:
        return None
    prefix = "calib_" if recipe.calibrates else ""
    return text_of(
        source.path,
        source.spec.max_position_embeddings,
        data=options["calib_data" if recipe.calibrates else "data"],
        num_samples=options[f"{prefix}samples"],
        seqlen=options[f"{prefix}seqlen"],
        flag="--calib-seqlen" if recipe.calibrates else "--seqlen",
        seed=options.get("seed", 0),
    )


def _workers(
    stack: ExitStack, source: Source, recipe: Recipe, options: Options, device: str
) -> tuple[CalibrationStates, Method]:
    """Where the samples are, and the method, in this process or over Ray's."""
    batch_size, num_workers = options["batch_size"], options.get("num_workers")
    if num_workers is None:
        if options.get("tp", 1) > 1:
            raise ConfigError(f"--tp {options['tp']} needs as many --num-workers, or more")
        return LocalStates(batch_size), recipe.method
    from engine.ray_quantize import RayStates
    from engine.ray_rows import shared_method

    if options.get("tp", 1) > num_workers:
        raise ConfigError(f"--tp {options['tp']} is more than --num-workers {num_workers}")
    states = stack.enter_context(RayStates(source.spec, num_workers, batch_size, device))
    return states, shared_method(recipe.method, states, options.get("tp", 1))


def _report(
    recipe: Recipe,
    source: Source,
    text: TokenSamples | None,
    options: Options,
    device: str,
    checkpoint: Path,
    record: JobRecord,
) -> None:
    """Measure the finished checkpoint, put the report into it, and say what it says."""
    work_dir: Path = options["work_dir"]
    typer.echo(
        f"{source.path} ({human(record.source_bytes)}) -> {work_dir} "
        f"({human(record.checkpoint_bytes)}) in {record.seconds:.0f} s, peak memory "
        f"{human(record.peak_memory)}"
    )
    if options["evaluate"]:
        assert text is not None
        with progress_bar() as progress:
            evaluation = evaluate(
                checkpoint,
                source.path,
                text.held_out,
                device=device,
                batch_size=options["batch_size"],
                progress=progress,
            )
        result = Result(
            name=recipe.name,
            evaluation=evaluation,
            bytes_before=record.source_bytes,
            bytes_after=record.checkpoint_bytes,
        )
        report = Report(
            kind="weights",
            title=f"{source.path.resolve().name}, {recipe.name}",
            model=str(work_dir),
            reference=str(source.path),
            results=(result,),
            # Squared there.
            linear_errors=tuple(
                {role: math.sqrt(error) for role, error in errors.items()}
                for errors in record.errors
                if errors
            ),
            settings=_flat(recipe.settings),
            text=text.record,
            seconds=record.seconds,
            peak_memory=peak_memory(),
        )
        write_report(report, checkpoint)
        say_results(report, work_dir)


def _flat(settings: dict[str, Any]) -> dict[str, Setting]:
    """Nested names with a point between: output.format."""
    found: dict[str, Setting] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": each for key, each in _flat(value).items()}
        else:
            found[name] = ", ".join(value) if isinstance(value, list | tuple) else value
    return found
