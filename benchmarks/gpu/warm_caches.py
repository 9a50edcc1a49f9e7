"""Compiles every form of every kernel before anything is timed, with all processors.

Triton keeps them on disk; the stages after this one find them there.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import triton

from benchmarks.gpu.bench import Bench
from kernels.gpu import compile as kernel_compile


def run(bench: Bench) -> None:
    modules = kernel_compile.modules()
    cases = [case for module in modules for case in kernel_compile.cases(module)]
    bench.section["cases"] = len(cases)
    if not bench.plan.on_gpu:
        return
    major, minor = torch.cuda.get_device_capability()
    started = time.monotonic()
    workers = min(32, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for case in cases:
            if 10 * major + minor >= case.min_capability:
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
