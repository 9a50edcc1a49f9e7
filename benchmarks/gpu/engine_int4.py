"""Llama-3-8B with int4 weights, over plain and int8 keys and values."""

from functools import partial

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engine_speed import measure


def run(bench: Bench) -> None:
    """Rehearsed with int8 only: bf16's stage rehearses the plain cache."""
    policies = {"plain": 0, "int8": 8} if bench.plan.on_gpu else {"int8": 8}
    for name, policy in policies.items():
        bench.attempt(name, partial(measure, bench, name, int4=True, policy=policy))
