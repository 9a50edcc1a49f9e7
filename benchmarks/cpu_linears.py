"""The CPU's linear kernels by number of rows; where kernels/int4_aten.py's thresholds come from.

    python -m benchmarks.cpu_linears [--threads N]

All linears of the 350M shape one after another, each with weights of its own, as in a decode
step. The best of several rounds, because a machine is never quite quiet.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.random_checkpoint import LlamaShape
from benchmarks.record import Table, save, show
from kernels import cpu
from kernels.int4_aten import pack_aten_int4
from kernels.int4_linear import Int4Weight, int4_linear, pack_int4

NUM_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 128, 256, 1024)
MOST_INT4_ROWS = 16  # beyond, the 4-bit kernel is far behind
ROUNDS = 7
SHAPE = LlamaShape()
NATIVE = ("AMX int4", "AMX int4, int8 rows") if cpu.library() is not None else ()
KERNELS = ("bf16 F.linear", "aten int4", "bf16 reordered", "int8", *NATIVE)

Linear = Callable[[Tensor], Tensor]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CPU's linear kernels.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = [_layer(seed) for seed in range(SHAPE.num_layers)]
    rows: list[list[str | float]] = []
    for num_rows in NUM_ROWS:
        row: list[str | float] = [num_rows]
        for kernel in KERNELS:
            skipped = kernel == "aten int4" and num_rows > MOST_INT4_ROWS
            row.append("" if skipped else _milliseconds(layers, kernel, num_rows))
        rows.append(row)
        print(*row, flush=True)
    table = Table(
        title="Linears of all layers, ms",
        columns=["rows", *KERNELS],
        rows=rows,
        notes=[f"The 350M shape, {arguments.threads} threads, the best of {ROUNDS} rounds."],
    )
    show(table)
    print(save("cpu_linears", "CPU linear kernels", [table]))


def _milliseconds(layers: list[list[dict[str, Linear]]], kernel: str, num_rows: int) -> float:
    inputs = {k: torch.randn(num_rows, k).bfloat16() for k in (k for _, k in _shapes())}
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for layer in layers:
            for (_, in_features), linear in zip(_shapes(), layer, strict=True):
                linear[kernel](inputs[in_features])
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def _shapes() -> list[tuple[int, int]]:
    """(out_features, in_features) of a layer's fused linears: qkv, o, gate_up, down."""
    heads = SHAPE.num_heads * SHAPE.head_dim
    return [
        (heads + 2 * SHAPE.num_kv_heads * SHAPE.head_dim, SHAPE.hidden_size),
        (SHAPE.hidden_size, heads),
        (2 * SHAPE.intermediate_size, SHAPE.hidden_size),
        (SHAPE.hidden_size, SHAPE.intermediate_size),
    ]


def _layer(seed: int) -> list[dict[str, Linear]]:
    draw = torch.Generator().manual_seed(seed)
    return [_linear(n, k, draw) for n, k in _shapes()]


def _linear(out_features: int, in_features: int, draw: torch.Generator) -> dict[str, Linear]:
    """One linear by kernel, from one set of 4-bit values."""
    groups = in_features // SHAPE.group_size
    q = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8, generator=draw)
    zeros = torch.full((groups, out_features), 8, dtype=torch.uint8)
    scales = torch.rand(groups, out_features, generator=draw) * 0.01 + 0.005
    exact = pack_aten_int4(q, zeros, scales, torch.bfloat16, "cpu")
    int8 = pack_aten_int4(q, zeros, scales, torch.bfloat16, "cpu", int8_activations=True)
    assert exact.few_rows is not None
    few = replace(exact, few_rows=replace(exact.few_rows, max_rows=MOST_INT4_ROWS))
    dense = torch.randn(out_features, in_features, generator=draw).bfloat16()
    native = {
        name: _through(pack_int4(q, zeros, scales, torch.bfloat16, "cpu", "rows" in name))
        for name in NATIVE
    }
    return native | {
        "bf16 F.linear": lambda x: F.linear(x, dense),
        "aten int4": _through(few),
        "bf16 reordered": _through(replace(exact, few_rows=None)),
        "int8": _through(replace(int8, few_rows=None)),
    }


def _through(weight: Int4Weight) -> Linear:
    return lambda x: int4_linear(x, weight, None)


if __name__ == "__main__":
    main()
