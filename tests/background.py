"""Triton's interpreter and compiler, at work while other tests leave processors idle.

Together they take eight minutes of a processor, while most other tests use one and wait for
processes of their own. They get what nobody else wants (SCHED_IDLE: Ray's workers have a niceness
of 15, beside which 19 would be a competitor), and their tests come last.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.gpu.compile import Compiled, Job, compile_job, jobs

Run = subprocess.CompletedProcess[str]


@dataclass(frozen=True, slots=True)
class Background:
    interpreted: dict[Path, Future[Run]]  # by file of tests/interpreted
    compiled: dict[Job, Future[Compiled]]


@contextmanager
def computing(asked: Sequence[dict[str, Any]]) -> Iterator[Background]:
    """Of tests with these parameters: `path`, or `module` of kernels/gpu and `capability`."""
    files = [params["path"] for params in asked if "path" in params]
    work = [
        job
        for params in asked
        if "module" in params
        for job in jobs(params["module"], [params["capability"]])
    ]
    # One process per processor: more would compete with what the tests in front have started.
    share = max(1, len(os.sched_getaffinity(0)) // (2 if files and work else 1))
    spawn = multiprocessing.get_context("spawn")  # torch has started threads here
    processes: list[subprocess.Popen[str]] = []
    interpreters = ThreadPoolExecutor(share)
    with tempfile.TemporaryDirectory(prefix="manta-triton-") as cache:  # not the user's
        compilers = ProcessPoolExecutor(share, spawn, initializer=_begin, initargs=(cache,))
        try:
            yield Background(
                {path: interpreters.submit(_interpret, path, processes) for path in files},
                {job: compilers.submit(compile_job, job) for job in work},
            )
        finally:  # with work left only where the run was stopped
            interpreters.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            compilers.shutdown(cancel_futures=True)


def _begin(cache: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.environ["TRITON_CACHE_DIR"] = cache


def _interpret(path: Path, processes: list[subprocess.Popen[str]]) -> Run:
    """A file in a process of its own: Triton decides when it is imported whether it interprets."""
    command = ["chrt", "--idle", "0", sys.executable, "-m", "pytest", "-q"]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", str(path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes.append(process)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
