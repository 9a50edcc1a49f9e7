"""Attention kernels in every form, against float64 over what the cache holds.

Decode rows and prompt chunks in one step, padding rows, all policies and head sizes, windows, soft
caps and ALiBi; contexts of one token, of full blocks and in between.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, poisoned, worst_row_error
from benchmarks.gpu.caches import (
    Paged,
    attention_reference,
    make_step,
    random_cache,
    random_tables,
)
from benchmarks.gpu.warm_caches import compile_ahead
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICY_NAMES

BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    policy: int = 0
    head_dim: int = 128
    group: int = 4  # query heads per key head
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False

    def __str__(self) -> str:
        name = f"{POLICY_NAMES[self.policy]} {str(self.dtype).removeprefix('torch.')}"
        name += f" D{self.head_dim} G{self.group}"
        name += f" window {self.window}" if self.window else ""
        return name + " cap" * (self.soft_cap is not None) + " alibi" * self.alibi


def run(bench: Bench) -> None:
    forms = list(_forms(bench.plan.on_gpu))
    compile_ahead(bench, [partial(_launch_form, bench, form) for form in forms])
    for form in forms:
        bench.attempt(str(form), partial(_check, bench, form))
        bench.save()


def _forms(on_gpu: bool) -> Iterator[Form]:
    if not on_gpu:
        yield Form(policy=8, head_dim=64, group=2, dtype=torch.float32, window=40)
        return
    options = Form(window=300, soft_cap=20.0, alibi=True)
    for policy in POLICY_NAMES:
        yield Form(policy=policy)
        yield replace(options, policy=policy)
        yield Form(policy=policy, group=8, dtype=torch.float16)
    for head_dim, policy in itertools.product((64, 80, 96, 256), POLICY_NAMES):
        yield Form(policy=policy, head_dim=head_dim)
    for policy in POLICY_NAMES:
        yield Form(policy=policy, group=1)
    for policy in (0, 8):
        yield Form(policy=policy, dtype=torch.float32)
        yield replace(options, policy=policy, dtype=torch.float32, window=None)


@dataclass(frozen=True, slots=True)
class Problem:
    q: Tensor
    paged: Paged
    step: GpuStep
    options: dict[str, Any]

    def launch(self) -> Tensor:
        out = torch.full_like(self.q, torch.nan)
        with poisoned():
            decode_attention(self.q, self.paged.cache, self.step, out, **self.options)
            prefill_attention(self.q, self.paged.cache, self.step, out, **self.options)
        return out


def _launch_form(bench: Bench, form: Form) -> None:
    _problem(bench, form).launch()


def _problem(bench: Bench, form: Form) -> Problem:
    """Three decode rows, one of padding, then chunks of prompts."""
    device = bench.plan.device
    num_kv_heads = 8 if bench.plan.on_gpu else 2  # as Llama-3-8B's, which warm_caches compiles
    decodes = [1, 640, 1500, 0] if bench.plan.on_gpu else [1, 70, 0]
    chunks = [(1, 1), (64, 64), (200, 777)] if bench.plan.on_gpu else [(3, 66)]
    tables = random_tables(len(decodes) + len(chunks) + 1, 1536, BLOCK_SIZE, device)
    paged = random_cache(
        tables.numel(), num_kv_heads, BLOCK_SIZE, form.head_dim, form.policy, form.dtype, device
    )
    queries = [1] * len(decodes) + [count for count, _ in chunks]
    contexts = decodes + [context for _, context in chunks]
    heads = num_kv_heads * form.group
    q = torch.randn(sum(queries), heads, form.head_dim, device=device, dtype=form.dtype)
    slopes = torch.rand(heads, device=device) * 0.1 if form.alibi else None
    scale = form.head_dim**-0.5
    options: dict[str, Any] = {
        "scale": scale, "window": form.window, "soft_cap": form.soft_cap, "alibi_slopes": slopes
    }  # fmt: skip
    step = make_step(queries, contexts, len(decodes), tables, BLOCK_SIZE)
    return Problem(q, paged, step, options)


def _check(bench: Bench, form: Form) -> None:
    problem = _problem(bench, form)
    step = problem.step
    expected = attention_reference(problem.q, problem.paged, step, **problem.options)
    out = problem.launch()
    padding = (step.context_lens[: step.num_decodes] == 0).nonzero().flatten().tolist()
    real = [row for row in range(len(out)) if row not in padding]
    error = worst_row_error(out[real].flatten(0, 1), expected[real].flatten(0, 1))
    limit = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 1e-4}[form.dtype]
    bench.check(str(form), error, limit)
