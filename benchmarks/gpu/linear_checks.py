"""The int4 linear and its neighbours in every form, against float64 over what the weights mean.

Odd numbers of rows, group sizes 32, 64, 128 and one per column, zero points, biases, reordered
inputs; bf16, fp16 and float32, which a GPU computes exactly.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench, poisoned, worst_row_error
from benchmarks.gpu.warm_caches import compile_ahead
from benchmarks.gpu.weights import random_int4
from kernels.activation import silu_mul
from kernels.gpu.chip import chip_of
from kernels.gpu.w4a16 import w4a16_silu_mul
from kernels.gpu.w4a16_pack import TILE, W4A16Weight
from kernels.gpu.w4a16_tiles import CUBLAS, choose_tile
from kernels.int4_linear import int4_linear, int4_silu_mul, pack_int4
from kernels.norm import add_rms_norm
from kernels.partials import Partials

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
ROWS = (1, 2, 15, 17, 33, 65, 100, 300, 1000)
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Form:
    group_size: int
    dtype: torch.dtype
    bias: bool
    ordered: bool  # the layer's inputs are gathered first, as GPTQ's act-order wants
    rows: tuple[int, ...]

    def __str__(self) -> str:
        name = f"{str(self.dtype).removeprefix('torch.')} groups of {self.group_size}"
        return name + " bias" * self.bias + " ordered" * self.ordered


def run(bench: Bench) -> None:
    forms = list(_forms(bench.plan.on_gpu))
    compile_ahead(bench, [partial(_launch_form, bench, form) for form in forms])
    for form in forms:
        bench.attempt(str(form), partial(_check_form, bench, form))
        bench.save()
    for dtype, splits in itertools.product(_dtypes(bench), (0, 3)):
        label = f"{str(dtype).removeprefix('torch.')} parts {splits}"
        bench.attempt(f"norm {label}", partial(_check_norm, bench, label, dtype, splits))
        bench.attempt(f"silu {label}", partial(_check_silu, bench, label, dtype, splits))
    bench.save()


def _dtypes(bench: Bench) -> tuple[torch.dtype, ...]:
    return tuple(LIMITS) if bench.plan.on_gpu else (torch.float32,)


def _forms(on_gpu: bool) -> Iterator[Form]:
    if not on_gpu:
        yield Form(64, torch.float32, bias=True, ordered=True, rows=(3,))
        return
    for group_size in (32, 64, 128, 512):
        yield Form(group_size, torch.bfloat16, bias=group_size == 64, ordered=False, rows=ROWS)
    for dtype in (torch.float16, torch.float32):
        yield Form(128, dtype, bias=True, ordered=False, rows=ROWS)
    yield Form(128, torch.bfloat16, bias=True, ordered=True, rows=(1, 40))


@dataclass(frozen=True, slots=True)
class Problem:
    packed: Any
    weight: Tensor  # float32 [N, K], what it means
    order: Tensor | None
    bias: Tensor | None

    def launch(self, x: Tensor) -> dict[str, Tensor | Partials]:
        """By what it is called; "gated kernel" where the gated form can compute the product."""
        packed, bias = self.packed, self.bias
        with poisoned():
            found: dict[str, Tensor | Partials] = {
                "": int4_linear(x, packed, bias),
                " partial": int4_linear(x, packed, bias, partial=True),
                " gated": int4_silu_mul(x, packed, bias),
            }
            if isinstance(packed, W4A16Weight) and _fits_gated(x, packed):
                found[" gated kernel"] = w4a16_silu_mul(self.gather(x), packed, bias)
        return found

    def gather(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(1, self.order)


def _fits_gated(x: Tensor, weight: W4A16Weight) -> bool:
    """The engine takes it for fewer shapes: those on which it is faster."""
    shape, chip = weight.shape, chip_of(x.device)
    tile = choose_tile("w4a16_gated", *shape, weight.group_size, x.dtype, len(x), chip)
    return tile != CUBLAS and shape[0] % (2 * TILE) == 0


def _launch_form(bench: Bench, form: Form) -> None:
    problem = _problem(bench, form)
    for m in form.rows:
        problem.launch(_input(problem, m, form.dtype))


def _input(problem: Problem, m: int, dtype: torch.dtype) -> Tensor:
    weight = problem.weight
    return torch.randn(m, weight.shape[1], device=weight.device, dtype=dtype)


def _problem(bench: Bench, form: Form) -> Problem:
    device, n, k = bench.plan.device, 384 if bench.plan.on_gpu else 128, 512
    if not bench.plan.on_gpu:
        k = 128
    q, zeros, scales, weight = random_int4(n, k, form.group_size, device, form.dtype)
    order = torch.randperm(k, device=device) if form.ordered else None
    packed = pack_int4(q, zeros, scales, form.dtype, "cuda", input_order=order)
    bias = torch.randn(n, device=device, dtype=form.dtype) if form.bias else None
    return Problem(packed, weight, order, bias)


def _check_form(bench: Bench, form: Form) -> None:
    problem, limit = _problem(bench, form), LIMITS[form.dtype]
    for m in form.rows:
        x = _input(problem, m, form.dtype)
        exact = problem.gather(x).double() @ problem.weight.double().t()
        if problem.bias is not None:
            exact += problem.bias.double()
        gate, up = exact.chunk(2, 1)
        for name, found in problem.launch(x).items():
            gated = "gated" in name
            expected = F.silu(gate) * up if gated else exact
            error = worst_row_error(_sum(found), expected)
            bench.check(f"{form} M={m}{name}", error, 2 * limit if gated else limit)


def _sum(y: Tensor | Partials) -> Tensor:
    return y.sum() if isinstance(y, Partials) else y


def _random(
    bench: Bench, shape: tuple[int, int], dtype: torch.dtype, splits: int
) -> Tensor | Partials:
    device = bench.plan.device
    if splits == 0:
        return torch.randn(shape, device=device, dtype=dtype)
    bias = torch.randn(shape[1], device=device, dtype=dtype)
    return Partials(torch.randn(splits, *shape, device=device), bias, dtype)


def _exact(x: Tensor | Partials) -> Tensor:
    if isinstance(x, Tensor):
        return x.double()
    assert x.bias is not None
    return x.data.double().sum(0) + x.bias.double()


def _check_norm(bench: Bench, label: str, dtype: torch.dtype, splits: int) -> None:
    for shape in ((1, 4096), (7, 2560)) if bench.plan.on_gpu else ((3, 96),):
        x = _random(bench, shape, dtype, splits)
        residual = torch.randn(shape, device=bench.plan.device, dtype=dtype)
        weight = torch.rand(shape[1], device=bench.plan.device, dtype=dtype) + 0.5
        total = _exact(x) + residual.double()
        normed = total / (total.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
        with poisoned():
            found, summed = add_rms_norm(x, residual, weight, EPS)
        limit = LIMITS[dtype]
        bench.check(f"norm {label} {shape[1]}", worst_row_error(found, normed), limit)
        bench.check(f"residual {label} {shape[1]}", worst_row_error(summed, total), limit)


def _check_silu(bench: Bench, label: str, dtype: torch.dtype, splits: int) -> None:
    shape = (33, 2 * 1504) if bench.plan.on_gpu else (3, 2 * 40)
    x = _random(bench, shape, dtype, splits)
    gate, up = _exact(x).chunk(2, 1)
    with poisoned():
        found = silu_mul(x)
    bench.check(f"silu {label}", worst_row_error(found, F.silu(gate) * up), LIMITS[dtype])
