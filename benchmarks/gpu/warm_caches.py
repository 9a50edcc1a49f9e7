"""Compiles every form of every kernel before anything is timed, with all processors.

Triton keeps them on disk; the stages after this one find them there.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks.gpu.bench import Bench, OutOfTimeError
from kernels.gpu import compile as kernel_compile

T = TypeVar("T")


def run(bench: Bench) -> None:
    modules = kernel_compile.modules()
    cases = [case for module in modules for case in kernel_compile.cases(module)]
    bench.section["cases"] = len(cases)
    if not bench.plan.on_gpu:
        return
    major, minor = torch.cuda.get_device_capability()
    started = time.monotonic()
    with _compiling(bench, share=0.9):
        for case in cases:
            if case.min_capability <= 10 * major + minor <= case.max_capability:
                bench.attempt(case.label, partial(warm, case))
    bench.section["compile_s"] = round(time.monotonic() - started, 1)


def warm(case: kernel_compile.CompileCase) -> None:
    """Compiles as a launch would."""
    # In order, since only positional types become pointers.
    types = iter(case.arguments)
    arguments = [
        case.constants[name] if name in case.constants else next(types)
        for name in case.kernel.arg_names
    ]
    case.kernel.warmup(*arguments, grid=(1,), **case.options)


def compile_ahead(bench: Bench, actions: Iterable[Callable[[], object]]) -> None:
    """What these launch is compiled, all at once, and not run; their results mean nothing.

    It takes more than half of the stage's time at most: the rest is compiled when it is launched.
    """
    if not bench.plan.on_gpu:
        return
    started, launch = time.monotonic(), JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *arguments, warmup=True, **options)

    with _compiling(bench, share=0.6), patch.object(JITFunction, "run", compile_only):
        for action in actions:
            with suppress(Exception):  # it will be told when it happens again
                action()
    bench.section["compile_s"] = round(time.monotonic() - started, 1)


@contextmanager
def _compiling(bench: Bench, share: float) -> Iterator[None]:
    """Triton compiles in threads meanwhile; what has not begun after this share of the stage's
    time is dropped.
    """
    now = time.monotonic()
    until = now + share * (bench.deadline - now)
    with _Pool(until) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        yield


class _Pool(ThreadPoolExecutor):
    def __init__(self, until: float) -> None:
        super().__init__(min(32, len(os.sched_getaffinity(0))))
        self._until = until

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        def in_time() -> T:
            if time.monotonic() > self._until:
                raise OutOfTimeError
            return fn(*args, **kwargs)

        return super().submit(in_time)
