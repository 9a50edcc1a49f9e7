"""`manta lite` commands that only measure, and what measuring needs everywhere.

From their options to held-out text, numbers and a report.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import typer
from tqdm import tqdm

from engine.errors import ConfigError
from engine.models import load_spec
from engine.quantize.calibration import TokenSamples, samples
from engine.quantize.evaluation import Progress, evaluate, weight_bytes
from engine.quantize.kv_loss import QUANTIZED, bytes_per_token, kv_loss
from engine.quantize.report import HTML_FILE, JSON_FILE, Report, Result, write_report
from engine.quantize.source import check_writable, peak_memory
from engine.quantize.verdict import words
from engine.rank_model import resolve_device, tensor_device
from engine.tokenizer import Tokenizer

SEQLEN = 2048  # of a sample, where the model's context is not shorter

Options: TypeAlias = dict[str, Any]  # of a command, by the names of its parameters


def run_kv(options: Options) -> None:
    """Measure cache policies on a model; the report goes into the work dir."""
    options = with_work_dir(options)
    path, device = expanded(options["model"]), device_of(options)
    policies = _policies(options["quant_policy"])
    text = _measured_text(path, options)
    directory = _report_directory(options)
    started = time.monotonic()
    with progress_bar() as progress:
        found = kv_loss(
            path,
            policies,
            text.held_out,
            device=device,
            batch_size=options["batch_size"],
            progress=progress,
        )
    sizes = bytes_per_token(path, (0, *policies))
    report = Report(
        kind="kv_cache",
        title=f"{path.resolve().name}, keys and values",
        model=str(path),
        reference=str(path),
        results=tuple(
            Result(
                name=f"quant_policy {policy}",
                evaluation=evaluation,
                bytes_before=sizes[0],
                bytes_after=sizes[policy],
            )
            for policy, evaluation in found.items()
        ),
        text=text.record,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )
    write_report(report, directory)
    say_results(report, options["work_dir"])
    typer.echo(f"manta serve {path} --quant-policy {policies[0]}")


def run_eval(options: Options) -> None:
    """Measure a checkpoint; the report goes into the work dir."""
    options = with_work_dir(options)
    path, device = expanded(options["model"]), device_of(options)
    reference = expanded(options["reference"]) if options["reference"] else None
    text = _measured_text(path, options)
    directory = _report_directory(options)
    started = time.monotonic()
    with progress_bar() as progress:
        evaluation = evaluate(
            path,
            reference,
            text.held_out,
            device=device,
            batch_size=options["batch_size"],
            progress=progress,
        )
    result = Result(
        name=path.resolve().name,
        evaluation=evaluation,
        bytes_before=weight_bytes(reference) if reference is not None else None,
        bytes_after=weight_bytes(path),
    )
    report = Report(
        kind="weights",
        title=path.resolve().name,
        model=str(path),
        reference=str(reference) if reference is not None else None,
        results=(result,),
        text=text.record,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )
    write_report(report, directory)
    say_results(report, options["work_dir"])


def _measured_text(path: Path, options: Options) -> TokenSamples:
    return text_of(
        path,
        load_spec(path).max_position_embeddings,
        data=options["data"],
        num_samples=options["samples"],
        seqlen=options["seqlen"],
        flag="--seqlen",
    )


def _policies(text: str) -> list[int]:
    """Of 8,4."""
    known = [str(policy) for policy in QUANTIZED]
    parts = text.split(",")
    if not all(part in known for part in parts):
        raise ConfigError(
            f"--quant-policy takes {', '.join(known)} or several of them by comma, such as 8,4, "
            f"got {text!r}"
        )
    return [int(part) for part in parts]


def text_of(
    path: Path,
    context: int,
    *,
    data: str,
    num_samples: int,
    seqlen: int | None,
    flag: str,
    seed: int = 0,
) -> TokenSamples:
    if seqlen is not None and seqlen > context:
        raise ConfigError(
            f"{flag} {seqlen} is beyond the {context} positions this model was made for; give at "
            "most that, or leave it out"
        )
    return samples(
        Tokenizer.load(path),
        data,
        num_samples=num_samples,
        seqlen=seqlen or min(SEQLEN, context),
        seed=seed,
    )


def device_of(options: Options) -> str:
    return tensor_device(resolve_device(options["device"]))


def say_results(report: Report, directory: Path) -> None:
    for result in report.results:
        name = f"{result.name}: " if len(report.results) > 1 else ""
        typer.echo(f"{name}{words(result.evaluation)}")
    typer.echo(f"report: {directory / HTML_FILE}")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Of an evaluation, on a terminal's stderr, with the time that is left."""
    with tqdm(desc="measuring", unit="step", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def with_work_dir(options: Options) -> Options:
    """A shell leaves ~ as it is behind a =."""
    return options | {"work_dir": expanded(options["work_dir"])}


def expanded(path: str | Path) -> Path:
    """With the home directory for ~; ConfigError for a user there is not."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} begins with ~ and the name of no user here") from error


def _report_directory(options: Options) -> Path:
    """ConfigError when a report is there already."""
    directory: Path = options["work_dir"]
    if (directory / JSON_FILE).exists() and not options["overwrite"]:
        raise ConfigError(
            f"--work-dir {directory} has a report already; choose another directory, or "
            "--overwrite to replace it"
        )
    check_writable(directory)
    return directory
