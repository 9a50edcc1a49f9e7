"""Does programmatic dependent launch survive the capture in a CUDA graph, and what does it save?

A chain of kernels, each of which adds one to what the kernel before it wrote.
"""

import itertools
from functools import partial

import torch
import triton
import triton.language as tl

from benchmarks.gpu.bench import Bench, Report

BLOCK = 128


@triton.jit  # type: ignore[untyped-decorator]
def _increment_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) + 1)


def run(bench: Bench) -> None:
    bench.warm_up()
    hopper = bench.plan.on_gpu and torch.cuda.get_device_capability() >= (9, 0)
    for blocks, pdl in itertools.product((1, 132), (False, True) if hopper else (False,)):
        name = f"{blocks} blocks, " + ("dependent" if pdl else "plain")
        result = bench.attempt(name, partial(_chain, bench, blocks, pdl))
        if result is not None:
            bench.section[name] = result
            bench.check(name, 0.0 if result["right"] else 1.0, 0.0)
        bench.save()


def _chain(bench: Bench, blocks: int, pdl: bool) -> Report:
    plan = bench.plan
    buffers = [torch.zeros(blocks * BLOCK, dtype=torch.int32, device=plan.device) for _ in range(2)]
    options = {"launch_pdl": True} if pdl else {}

    def chain() -> None:
        for i in range(plan.chain_length):
            x, y = buffers[i % 2], buffers[(i + 1) % 2]
            _increment_kernel[(blocks,)](x, y, BLOCK=BLOCK, PDL=pdl, num_warps=4, **options)

    us = bench.measure([chain], 1000)
    for buffer in buffers:
        buffer.zero_()
    if plan.on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        graph.replay()
    else:
        chain()
    result = buffers[plan.chain_length % 2]
    right = bool((result == plan.chain_length).all())
    return {"us_per_kernel": us / plan.chain_length, "right": right}
