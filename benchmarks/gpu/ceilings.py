"""What the GPU gives: copy, read and L2 bandwidth, the bf16 matrix rate.

The floors of the other stages are made of these numbers, not of a data sheet's.
"""

import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.bench import Bench, Report

BLOCK, STEPS = 4096, 4  # elements a program reads at once, and how often


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(x_ptr, sums_ptr, num_chunks, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Sums one chunk of x per program; more programs than chunks read the buffer again."""
    chunk = (tl.program_id(0) % num_chunks).to(tl.int64) * (BLOCK * STEPS)
    ptrs = x_ptr + chunk + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        acc += tl.load(ptrs + step * BLOCK, cache_modifier=".cg")
    tl.store(sums_ptr + tl.program_id(0), tl.sum(acc, 0))


def run(bench: Bench) -> None:
    plan, section = bench.plan, bench.section
    section["device"] = device_facts(plan.on_gpu)
    bench.warm_up()
    x = torch.rand(plan.stream_numel, device=plan.device)
    num_bytes = x.numel() * x.element_size()

    def copy_rate() -> None:
        y = torch.empty_like(x)
        us = bench.measure([lambda: y.copy_(x)], 4000)
        section["copy_tb_s"] = 2 * num_bytes / us / 1e6

    def read_rate() -> None:
        us, total = _time_read(bench, x, passes=1)
        section["read_tb_s"] = num_bytes / us / 1e6
        bench.check("read kernel", abs(total / float(x.sum(dtype=torch.float64)) - 1), 1e-5)

    def l2_rate() -> None:
        part = x[: plan.l2_numel]
        us, _ = _time_read(bench, part, passes=16)
        section["l2_read_tb_s"] = 16 * part.numel() * part.element_size() / us / 1e6

    def matmul_rate() -> None:
        size = plan.matmul_size
        a, b = (torch.randn(size, size, device=plan.device, dtype=plan.dtype) for _ in range(2))
        us = bench.measure([lambda: a @ b], 1400)
        section["matmul_tflop_s"] = 2 * size**3 / us / 1e6

    for action in (copy_rate, read_rate, l2_rate, matmul_rate):
        bench.attempt(action.__name__, action)
        bench.save()


def _time_read(bench: Bench, x: Tensor, passes: int) -> tuple[float, float]:
    """Microseconds to read x `passes` times, and the sum of one pass."""
    num_chunks = x.numel() // (BLOCK * STEPS)
    sums = torch.empty(num_chunks * passes, device=x.device)

    def call() -> None:
        _read_kernel[(num_chunks * passes,)](
            x, sums, num_chunks, BLOCK=BLOCK, STEPS=STEPS, num_warps=8
        )

    us = bench.measure([call], passes * x.numel() * x.element_size() / 5e6)
    return us, float(sums[:num_chunks].sum(dtype=torch.float64))


def device_facts(on_gpu: bool) -> Report:
    facts: Report = {"torch": torch.__version__, "triton": triton.__version__}
    if not on_gpu:
        return facts | {"name": "Triton's interpreter"}
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mb": properties.L2_cache_size / 1e6,
        "cuda": torch.version.cuda,
    }
    query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        smi = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return facts | {"nvidia_smi": repr(error)}
    values = smi.stdout.strip().split(", ")
    return facts | {"nvidia_smi": dict(zip(query.split(","), values, strict=False))}
