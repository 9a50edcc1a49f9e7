"""The engine on a random Llama-3-8B: decode steps, prompts and the GPU's idle share."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, Report
from benchmarks.gpu.engines import Streams, decoding, generate, random_engine, random_prompts
from benchmarks.gpu.floors import kernel_floors, step_floor
from engine.engine import Engine

WARM_STEPS = 8
PROFILED_STEPS = 8
# Gaps between kernels of one graph are shorter; longer ones are waits for the host.
WAIT_US = 5.0
W4A16_KERNEL, PRODUCTS = "w4a16_kernel", ("qkv", "o", "gate_up", "down")
NAME_LENGTH = 60  # of kernels: cuBLAS's are longer


def measure(bench: Bench, name: str, int4: bool, policy: int) -> None:
    """One engine, into the section under `name`."""
    plan, report = bench.plan, bench.section.setdefault(name, {})
    started = time.perf_counter()
    settings: dict[str, Any] = {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quant_policy": policy,
        "max_num_seqs": max(plan.streams),
        "session_len": plan.model.max_position_embeddings,
    }
    if plan.on_gpu:
        settings["session_len"] = 2 * plan.context
    else:
        settings["cache_max_entry_count"] = 8
    with random_engine(plan.model, int4, **settings) as engine:
        report["start_s"] = round(time.perf_counter() - started, 1)
        report["num_blocks"] = engine.info.num_blocks
        if plan.on_gpu:  # what the first prompt costs once
            generate(engine, random_prompts(2, plan.context, plan.model.vocab_size), 4)
        bench.save()
        if policy == 0:
            bench.attempt(f"{name} prompts", partial(_time_prompts, bench, engine, report))
        decode: Report = report.setdefault("decode", {})
        for streams in plan.streams:
            label = f"{name} {streams} streams"
            floor_us = partial(_floor_us, bench, int4, policy, streams)
            action = partial(time_decode, bench, engine, label, streams, floor_us, decode)
            bench.attempt(label, action)
            if row := decode.get(str(streams)):
                row["floors_us"] = kernel_floors(bench, int4, policy, streams, row["context"])
            bench.save()


def _time_prompts(bench: Bench, engine: Engine, report: Report) -> None:
    plan = bench.plan
    count = 16 if plan.on_gpu else 1
    prompts = random_prompts(count, plan.context, plan.model.vocab_size)
    started = time.perf_counter()
    generate(engine, prompts, 1)
    report["prefill_tokens_per_s"] = count * plan.context / (time.perf_counter() - started)
    waits = []
    for prompt in random_prompts(5 if plan.on_gpu else 1, plan.context, plan.model.vocab_size):
        started = time.perf_counter()
        generate(engine, [prompt], 1)
        waits.append(time.perf_counter() - started)
    report["ttft_ms"] = statistics.median(waits) * 1e3


def _floor_us(bench: Bench, int4: bool, policy: int, streams: int, context: float) -> float:
    return step_floor(bench, int4, policy, streams, context).us


def time_decode(
    bench: Bench,
    engine: Engine,
    label: str,
    streams: int,
    floor_us: Callable[[float], float],
    decode: Report,
) -> None:
    """The row of so many streams, in `decode` before anything else can fail.

    A stream's context passes the plan's in the middle of the steps timed, or a little before: the
    first streams decode while the last ones' prompts are computed.
    """
    plan = bench.plan
    warm = WARM_STEPS if plan.on_gpu else 1
    length = plan.context - warm - plan.decode_steps // 2
    prompts = random_prompts(streams, length, plan.model.vocab_size)
    num_tokens = plan.context // 2 if plan.on_gpu else 2 * plan.decode_steps + 4
    with decoding(engine, prompts, num_tokens) as running:
        running.seconds_per_step(warm)
        seconds = running.seconds_per_step(plan.decode_steps)
        context = running.num_tokens / streams + warm + plan.decode_steps // 2
        row: Report = {
            "step_us": seconds * 1e6,
            "tokens_per_s": streams / seconds,
            "context": context,
            "floor_us": floor_us(context),
            "prompts_s": running.prefill_s,
        }
        decode[str(streams)] = row
        bench.save()
        if plan.on_gpu:
            profiled = partial(_profile, running, row["step_us"], plan.model.num_layers)
            row |= bench.attempt(f"{label} profile", profiled) or {}


@dataclass(frozen=True, slots=True)
class Span:
    """What the GPU did, in microseconds."""

    name: str
    start: float
    end: float


def _profile(running: Streams, step_us: float, num_layers: int) -> Report:
    """Profiling stretches gaps, hardly kernels."""
    torch.cuda.synchronize()  # the step ahead is not among those counted
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        running.seconds_per_step(PROFILED_STEPS)
        torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or []
        if event.device_type.name == "CUDA"
    ]
    kernels = step_kernels(spans, PROFILED_STEPS, num_layers)
    return shares(spans, PROFILED_STEPS, step_us) | {"kernels": kernels}


def step_kernels(spans: Sequence[Span], num_steps: int, num_layers: int) -> dict[str, Report]:
    """Launches and microseconds of a step by kernel, the longest first.

    The four products of a layer are one kernel; their order tells them apart, unless a tuned tile
    leaves some to cuBLAS.
    """
    kernels: dict[str, Report] = {}
    spans = sorted(spans, key=lambda span: span.start)
    products = [span for span in spans if span.name == W4A16_KERNEL]
    whole = len(products) == num_steps * num_layers * len(PRODUCTS)
    order = itertools.cycle(PRODUCTS)
    for span in spans:
        name = span.name[:NAME_LENGTH]
        if whole and span.name == W4A16_KERNEL:
            name = f"int4 {next(order)}"
        kernel = kernels.setdefault(name, {"launches": 0.0, "us": 0.0})
        kernel["launches"] += 1 / num_steps
        kernel["us"] += (span.end - span.start) / num_steps
    return dict(sorted(kernels.items(), key=lambda item: -item[1]["us"]))


def shares(spans: Sequence[Span], num_steps: int, step_us: float) -> Report:
    """Shares of the time in which no kernel ran, and in which the GPU waited for the host.

    The first one is of steps that were not profiled.
    """
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    spans = sorted(spans, key=lambda span: span.start)
    busy, waited, start, end = 0.0, 0.0, spans[0].start, spans[0].end
    for span in spans[1:]:
        if span.start > end:
            busy += end - start
            waited += span.start - end if span.start - end > WAIT_US else 0.0
            start = span.start
        end = max(end, span.end)
    busy += end - start
    busy_us = busy / num_steps
    return {
        "busy_us": busy_us,
        "idle_share": 1 - busy_us / step_us,
        "waiting_share": waited / (end - spans[0].start),
    }
