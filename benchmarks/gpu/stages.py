"""The stages in their order, each in a process of its own under a time limit.

A fault or a hang in one does not lose the others: the report is on disk after every step.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import plan
from benchmarks.gpu.bench import Report, run_stage

RUN_SECONDS = 525.0  # of all stages: under nine minutes with what starts and ends the run
GRACE_SECONDS = 10.0  # beyond its limit a stage's process is ended


@dataclass(frozen=True, slots=True)
class Stage:
    """A module of this package with run(bench), and the limit of its process, imports included."""

    name: str
    seconds: float


# What would be missed most comes first. 390 s by estimate on 16 processors, of which compilers
# take 60: 0.9 s of a processor for each of 310 kernels, and 45 in turn for the tiny engines.
STAGES = (
    Stage("ceilings", 20),
    Stage("warm_caches", 40),
    Stage("linear_checks", 30),
    Stage("attention_checks", 35),
    Stage("rope_checks", 25),
    Stage("engine_tokens", 55),
    Stage("linears", 55),
    Stage("decode_attention", 45),
    Stage("engine_int4", 75),
    Stage("sampling", 20),
    Stage("engine_bf16", 35),
    Stage("transformers_speed", 45),
    Stage("prefill_attention", 20),
    Stage("rope_store", 13),
    Stage("dependent_launch", 12),
)
TUNE = Stage("tune", 480)  # on demand only


def run_all(
    names: Sequence[str], path: Path, rehearse: bool, after_each: Callable[[Report], object]
) -> Report:
    """The stages' report. A rehearsal has nothing to protect and takes one process for all."""
    wanted = [stage for stage in (*STAGES, TUNE) if stage.name in names]
    if rehearse:
        _start([stage.name for stage in wanted], path, 600.0, rehearse)
        return read_report(path)
    deadline = time.monotonic() + RUN_SECONDS
    reserved = sum(stage.seconds for stage in wanted)
    for stage in wanted:
        reserved -= stage.seconds
        left = deadline - time.monotonic() - GRACE_SECONDS
        if left < GRACE_SECONDS:
            _note(path, stage.name, "no time left", 0.0)
            continue
        print(f"== {stage.name}", flush=True)
        # What earlier stages left over is this one's as well.
        _start([stage.name], path, min(left, max(stage.seconds, left - reserved)), rehearse)
        try:
            after_each(read_report(path))
        except Exception:  # noqa: BLE001 - the numbers are on disk, and other stages are to run
            traceback.print_exc()
    return read_report(path)


def _start(names: list[str], path: Path, seconds: float, rehearse: bool) -> None:
    # An instant of the system's clock, so that the process's start counts.
    deadline = time.monotonic() + seconds
    flags = ["--json", str(path), "--deadline", str(deadline), "--in-process"]
    if rehearse:
        flags.append("--rehearse")
    command = [sys.executable, "-m", "benchmarks.gpu", *flags, *names]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    started = time.monotonic()
    try:
        ended = subprocess.run(
            command, env=environment, timeout=seconds + GRACE_SECONDS, check=False
        )
        fate = f"exit code {ended.returncode}" if ended.returncode else ""
    except subprocess.TimeoutExpired:
        fate = f"ended after {seconds + GRACE_SECONDS:.0f} s"
    if fate:
        unfinished = [n for n in names if read_report(path).get(n, {}).get("ended") != "complete"]
        for name in unfinished:
            _note(path, name, fate, time.monotonic() - started)


def run_here(names: Sequence[str], path: Path, deadline: float, rehearse: bool) -> None:
    """In this process, which `run_all` started; the deadline is by time.monotonic()."""
    sizes = plan.REHEARSAL if rehearse else plan.GPU
    for name in names:
        run_stage(name, sizes, path, deadline)


def read_report(path: Path) -> Report:
    report: Report = json.loads(path.read_text()) if path.exists() else {}
    return report


def _note(path: Path, name: str, fate: str, seconds: float) -> None:
    report = read_report(path)
    section = report.setdefault(name, {})
    section |= {"ended": fate, "seconds": round(seconds, 1)}
    path.write_text(json.dumps(report, indent=1))
    print(f"  {name}: {fate}", flush=True)
