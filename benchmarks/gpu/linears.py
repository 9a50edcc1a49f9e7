"""The int4 linear beside cuBLAS in bf16, tinygemm and Marlin, on Llama-3-8B's four shapes.

All compute the same function: groups of 128 with zero points. The floor of a shape is the larger
of its bytes at the read bandwidth and its FLOPs at the matrix rate.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench, Report, copies, poisoned, worst_row_error
from benchmarks.gpu.floors import int4_bytes
from benchmarks.gpu.weights import copies_of, random_int4
from kernels.int4_linear import int4_linear, int4_silu_mul, pack_int4
from kernels.partials import Partials

GROUP = 128
TINYGEMM_ROWS = 256  # it reads the weights again for every 16 rows


@dataclass(frozen=True, slots=True)
class Problem:
    """One matrix in every form its peers need, each rotated through four times the L2."""

    name: str
    n: int
    k: int
    quantised: tuple[Tensor, Tensor, Tensor]  # q [K, N], zeros, scales
    packed: list[Any]
    reference: Tensor  # float32 [N, K]
    dense: list[Tensor]  # [N, K] in the activations' type
    tinygemm: list[tuple[Tensor, Tensor]]  # words; scales and zeros [K / GROUP, N, 2]

    @property
    def num_bytes(self) -> float:
        return int4_bytes(self.n * self.k, GROUP)

    def floor_us(self, bench: Bench, m: int) -> float:
        bytes_us = (self.num_bytes + 2 * m * (self.n + self.k)) / bench.read_rate
        return 1e6 * max(bytes_us, 2 * m * self.n * self.k / bench.matmul_rate)


def run(bench: Bench) -> None:
    bench.warm_up()
    problems = [_problem(bench, name, n, k) for name, (n, k) in bench.plan.linears.items()]
    rows: list[Report] = []
    bench.section["rows"] = rows
    for m, problem in itertools.product(bench.plan.row_counts, problems):
        rows.append(_measure(bench, problem, m))
        bench.save()
    # Last: a library's fault could end what this process can do on the GPU.
    bench.peer("marlin", partial(_measure_marlin, bench, problems, rows))


def _problem(bench: Bench, name: str, n: int, k: int) -> Problem:
    plan = bench.plan
    q, zeros, scales, reference = random_int4(n, k, GROUP, plan.device, plan.dtype)
    packed = pack_int4(q, zeros, scales, plan.dtype, "cuda")
    dense = reference.to(plan.dtype)
    count = bench.rotation(n * k // 2)
    tinygemm: list[tuple[Tensor, Tensor]] = []
    if plan.on_gpu:
        # The even column in the high nibble; w = (q - 8) * scale + zero.
        columns = q.t().contiguous()
        pairs = columns[:, ::2] << 4 | columns[:, 1::2]
        pack = torch.ops.aten._convert_weight_to_int4pack
        words = bench.peer(f"{name} tinygemm packing", lambda: pack(pairs.contiguous(), 8))
        if words is not None:
            params = torch.stack((scales, (8 - zeros.to(scales.dtype)) * scales), -1)
            tinygemm = list(zip(copies(words, count), copies(params, count), strict=True))
    return Problem(
        name=name,
        n=n,
        k=k,
        quantised=(q, zeros, scales),
        packed=copies_of(packed, count),
        reference=reference,
        dense=copies(dense, bench.rotation(dense.numel() * dense.element_size())),
        tinygemm=tinygemm,
    )


def _measure(bench: Bench, problem: Problem, m: int) -> Report:
    """One shape at one M: ours and the peers, in microseconds."""
    x = _input(bench, problem, m)
    expected = x.float() @ problem.reference.t()
    floor_us = problem.floor_us(bench, m)
    dense_us = problem.n * problem.k * 2 / bench.read_rate * 1e6
    row: Report = {"shape": problem.name, "n": problem.n, "k": problem.k, "m": m}
    row["floor_us"] = floor_us

    def timed(
        name: str, calls: Sequence[Callable[[], object]], about_us: float, expected: Tensor | None
    ) -> None:
        label = f"{problem.name} M={m} {name}"

        def check_and_time() -> float:
            with poisoned():
                out = calls[-1]()
            if isinstance(out, Partials):
                out = out.sum()
            if expected is not None:
                assert isinstance(out, Tensor)
                bench.check(label, worst_row_error(out, expected), bench.limit)
            return bench.measure(calls, about_us)

        row[f"{name}_us"] = bench.attempt(label, check_and_time)

    timed("cublas", [partial(F.linear, x, w) for w in problem.dense], max(floor_us, dense_us), None)
    timed("ours", [partial(int4_linear, x, w, None) for w in problem.packed], floor_us, expected)
    parts = [partial(int4_linear, x, w, None, partial=True) for w in problem.packed]
    timed("partial", parts, floor_us, expected)
    if problem.name == "gate_up":
        gate, up = expected.chunk(2, 1)
        calls = [partial(int4_silu_mul, x, w, None) for w in problem.packed]
        timed("gated", calls, floor_us, F.silu(gate) * up)
    if m <= TINYGEMM_ROWS and problem.tinygemm:
        tiny = torch.ops.aten._weight_int4pack_mm
        calls = [partial(tiny, x, words, GROUP, params) for words, params in problem.tinygemm]
        label, about_us = f"{problem.name} M={m} tinygemm", floor_us * max(1, m / 16)
        row["tinygemm_us"] = bench.time_peer(label, calls, expected, about_us)
    return row


def _measure_marlin(bench: Bench, problems: Sequence[Problem], rows: Sequence[Report]) -> None:
    """Into the rows, which hold one shape at one M each."""
    peers.load(peers.MARLIN)
    for problem in problems:
        weight = peers.marlin_weight(*problem.quantised)
        weights = copies_of(weight, len(problem.packed))
        for row in rows:
            if row["shape"] == problem.name:
                x = _input(bench, problem, row["m"])
                expected = x.float() @ problem.reference.t()
                calls = [partial(peers.marlin_linear, x, each) for each in weights]
                label = f"{problem.name} M={row['m']} marlin"
                row["marlin_us"] = bench.time_peer(label, calls, expected, row["floor_us"])
                bench.save()


def _input(bench: Bench, problem: Problem, m: int) -> Tensor:
    return torch.randn(m, problem.k, device=bench.plan.device, dtype=bench.plan.dtype)
