"""Finds the fastest tiles among each launcher's candidates: configs/kernels/<gpu>.json.

A candidate counts when it computes what the default tile does; an entry is written where it is
faster by more than a fiftieth, which is what two measurements of one tile differ by.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu.bench import Bench, Report, worst_row_error
from benchmarks.gpu.caches import make_step, random_cache, random_tables
from benchmarks.gpu.linears import GROUP
from benchmarks.gpu.warm_caches import warm
from benchmarks.gpu.weights import copies_of, random_int4
from kernels.gpu import tiles
from kernels.gpu.compile import CompileCase, compile_case
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.prefill_attention import prefill_attention
from kernels.int4_linear import int4_linear, int4_silu_mul, pack_int4
from kernels.kv_layout import POLICY_NAMES
from kernels.norm import add_rms_norm
from kernels.partials import Partials

GAIN = 1.02
EPS = 1e-5
ROW_COUNTS = (1, 16, 32, 64, 128, 256, 768)  # one of each bucket of rows


@dataclass(frozen=True, slots=True)
class Problem:
    """Calls of one launcher, over inputs that rotate past the L2."""

    kernel: str
    label: str
    calls: list[Callable[[], Tensor | Partials]]
    about_us: float


def run(bench: Bench) -> None:
    bench.warm_up()
    found: dict[str, list[Report]] = {}
    bench.section["kernels"] = found
    for problem in _problems(bench):
        module: Any = import_module(f"kernels.gpu.{tiles.module_of(problem.kernel)}")
        if not hasattr(module, "candidates"):
            continue
        entry = bench.attempt(problem.label, partial(_tune, bench, problem, module))
        if entry is not None:
            print(f"  {problem.label}: {entry}", flush=True)
            found.setdefault(problem.kernel, []).append(entry)
        bench.save()


def _tune(bench: Bench, problem: Problem, module: Any) -> Report | None:
    with tiles.trial(problem.kernel, None) as asked:
        expected = _sum(problem.calls[0]())
        default_us = bench.measure(problem.calls, problem.about_us)
    if not asked:
        return None  # this shape goes another way
    key = asked[0]
    assert all(each == key for each in asked), asked
    candidates: list[tiles.Tile] = module.candidates(problem.kernel, **key)
    if bench.plan.on_gpu:
        candidates = _lean(candidates, partial(module.tile_case, problem.kernel, key))
    else:
        candidates = candidates[:1]
    times: list[tuple[float, tiles.Tile]] = []
    for tile in candidates:
        us = bench.attempt(
            f"{problem.label} {tile}", partial(_time, bench, problem, tile, expected)
        )
        if us is not None:
            times.append((us, tile))
    if not times:
        return None
    best_us, best = min(times, key=lambda each: each[0])
    bench.section.setdefault("us", {})[problem.label] = {"default": default_us, "best": best_us}
    return {"key": key, "tile": best} if default_us > GAIN * best_us else None


def _lean(
    candidates: list[tiles.Tile], case_of: Callable[[tiles.Tile], CompileCase]
) -> list[tiles.Tile]:
    """Those that do not spill: tests/test_gpu_compile.py would refuse the others' file."""
    major, minor = torch.cuda.get_device_capability()

    def spills(tile: tiles.Tile) -> int:
        case = replace(case_of(tile), elements=0)  # instructions are not asked for
        return compile_case(case, 10 * major + minor).spills

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(spills, candidates))
    lean = [tile for tile, spilt in zip(candidates, found, strict=True) if spilt == 0]
    with ThreadPoolExecutor(16) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for tile in lean:
            warm(case_of(tile))
    return lean


def _time(bench: Bench, problem: Problem, tile: tiles.Tile, expected: Tensor) -> float:
    with tiles.trial(problem.kernel, tile):
        error = worst_row_error(_sum(problem.calls[0]()), expected)
        assert error <= bench.limit, f"relative error {error:.1e}"
        return bench.measure(problem.calls, problem.about_us)


def _sum(y: Tensor | Partials) -> Tensor:
    return (y.sum() if isinstance(y, Partials) else y).flatten(0, -2).clone()


def _problems(bench: Bench) -> Iterator[Problem]:
    plan = bench.plan
    for name, (n, k) in plan.linears.items():
        yield from _linears(bench, name, n, k)
    yield _chain(bench)
    for policy in POLICY_NAMES if plan.on_gpu else (0,):
        yield from _attention(bench, policy)


def _linears(bench: Bench, name: str, n: int, k: int) -> Iterator[Problem]:
    plan = bench.plan
    q, zeros, scales, _ = random_int4(n, k, GROUP, plan.device, plan.dtype)
    packed = pack_int4(q, zeros, scales, plan.dtype, "cuda")
    weights = copies_of(packed, bench.rotation(n * k // 2))
    for m in ROW_COUNTS if plan.on_gpu else (1,):
        x = torch.randn(m, k, device=plan.device, dtype=plan.dtype)
        about_us = max(n * k / 2 / bench.read_rate, 2 * m * n * k / bench.matmul_rate) * 1e6
        whole: list[Callable[[], Tensor | Partials]] = [
            partial(int4_linear, x, weight, None) for weight in weights
        ]
        yield Problem("w4a16", f"{name} M={m}", whole, about_us)
        if name == "gate_up":
            gated: list[Callable[[], Tensor | Partials]] = [
                partial(int4_silu_mul, x, weight, None) for weight in weights
            ]
            yield Problem("w4a16_gated", f"{name} gated M={m}", gated, about_us)


def _chain(bench: Bench) -> Problem:
    """Products and norms that read each other's results, as in a decode step of one sequence."""
    plan = bench.plan
    n = k = plan.linears["qkv"][1]
    q, zeros, scales, _ = random_int4(n, k, GROUP, plan.device, plan.dtype)
    packed = pack_int4(q, zeros, scales, plan.dtype, "cuda")
    weights = copies_of(packed, bench.rotation(n * k // 2))
    x = torch.randn(1, k, device=plan.device, dtype=plan.dtype)
    norm = torch.ones(n, device=plan.device, dtype=plan.dtype)

    def chain() -> Tensor:
        hidden, residual = add_rms_norm(x, None, norm, EPS)
        for weight in weights:
            parts = int4_linear(hidden, weight, None, partial=True)
            hidden, residual = add_rms_norm(parts, residual, norm, EPS)
        return hidden

    about_us = len(weights) * (n * k / 2 / bench.read_rate * 1e6 + 5)
    return Problem("dependent_launch", "a chain of products and norms", [chain], about_us)


def _attention(bench: Bench, policy: int) -> Iterator[Problem]:
    plan, kind = bench.plan, POLICY_NAMES[policy]
    context = 4096 if plan.on_gpu else 70
    heads = (plan.num_heads, plan.head_dim)
    scale = plan.head_dim**-0.5

    def problem(attend: Any, num_seqs: int, queries: int) -> list[Callable[[], Tensor | Partials]]:
        tables = random_tables(num_seqs, context, plan.block_size, plan.device)
        paged = random_cache(
            tables.numel(), plan.num_kv_heads, plan.block_size, plan.head_dim, policy, plan.dtype,
            plan.device,
        )  # fmt: skip
        num_decodes = num_seqs if queries == 1 else 0
        step = make_step(
            [queries] * num_seqs, [context] * num_seqs, num_decodes, tables, plan.block_size
        )
        q = torch.randn(num_seqs * queries, *heads, device=plan.device, dtype=plan.dtype)
        out = torch.empty_like(q)

        def call() -> Tensor:
            attend(q, paged.cache, step, out, scale=scale)
            return out

        return [call]

    decode = problem(decode_attention, plan.num_seqs, 1)
    yield Problem("decode_attention", f"decode {kind}", decode, 200.0)
    chunk = problem(prefill_attention, 1, context)
    yield Problem("prefill_attention", f"prefill {kind}", chunk, 500.0)


def write(report: Report, folder: Path) -> Path:
    """The tiles of a report, as kernels/gpu/tiles.py reads them."""
    gpu = tiles.spelled(report["ceilings"]["device"]["name"])
    kernels = {name: entries for name, entries in report["tune"]["kernels"].items() if entries}
    path = folder / f"{gpu}.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"gpu": gpu, "triton": triton.__version__, "kernels": kernels}
    path.write_text(json.dumps(content, indent=1) + "\n")
    tiles.tables.cache_clear()
    tiles.tables(path)  # refuses what a launcher could not read
    return path
