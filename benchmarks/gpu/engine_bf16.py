"""Llama-3-8B with bf16 weights: what int4 gains, and a peer of transformers with equal bytes."""

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engine_speed import measure


def run(bench: Bench) -> None:
    measure(bench, "plain", int4=False, policy=0)
