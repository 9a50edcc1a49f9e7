"""What lies between the qkv projection and attention, beside its plain torch twin on the CPU.

Both store into caches of their own; compared are the rotated queries and the keys and values that
the caches hold afterwards. A value that lies between two levels may be rounded to either.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, poisoned, worst_row_error
from benchmarks.gpu.caches import held, make_step, on_cpu, random_cache, random_tables
from benchmarks.gpu.warm_caches import compile_ahead
from kernels.attention import AttentionMetadata
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICY_NAMES, LayerCache
from kernels.partials import Partials
from kernels.rope import RotaryTable, rope_and_store, signed_sin

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Of all that was stored: a value rounded the other way in every twentieth row.
STORED_LIMIT = 1e-2
BLOCK_SIZE, EPS = 64, 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    policy: int = 0
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    rotary_dim: int = 128
    splits: int = 0  # parts of the projection; 0: it is whole
    norm: bool = False
    decode: bool = False  # a step of few tokens, of which a program takes one each

    def __str__(self) -> str:
        name = f"{POLICY_NAMES[self.policy]} {str(self.dtype).removeprefix('torch.')}"
        name += f" D{self.head_dim} R{self.rotary_dim}"
        return (
            name
            + f" parts {self.splits}" * (self.splits > 0)
            + " norm" * self.norm
            + " decode" * self.decode
        )


def run(bench: Bench) -> None:
    forms = list(_forms(bench.plan.on_gpu))
    compile_ahead(bench, [partial(_launch_form, bench, form) for form in forms])
    for form in forms:
        bench.attempt(str(form), partial(_check, bench, form))
        bench.save()


def _forms(on_gpu: bool) -> Iterator[Form]:
    if not on_gpu:
        yield Form(policy=4, dtype=torch.float32, head_dim=32, rotary_dim=32, splits=2, norm=True)
        yield Form(policy=8, dtype=torch.float32, head_dim=32, rotary_dim=32, decode=True)
        return
    for policy, dtype in itertools.product(POLICY_NAMES, LIMITS):
        yield Form(policy=policy, dtype=dtype)
        yield Form(policy=policy, dtype=dtype, splits=4, norm=True)
        if dtype != torch.float32:
            yield Form(policy=policy, dtype=dtype, decode=True)
            yield Form(policy=policy, dtype=dtype, splits=4, norm=True, decode=True)
    for policy in POLICY_NAMES:
        yield Form(policy=policy, head_dim=80, rotary_dim=32)


@dataclass(frozen=True, slots=True)
class Problem:
    """A step on the device."""

    qkv: Tensor | Partials
    norm: Tensor | None
    table: RotaryTable
    cache: LayerCache
    step: GpuStep
    sizes: tuple[int, int, int]  # query heads, key heads, head_dim

    def launch(self) -> Tensor:
        with poisoned():
            return rope_and_store(
                self.qkv, self.norm, EPS, self.table, self.step.positions, self.cache, self.step,
                *self.sizes,
            )  # fmt: skip

    def compute_on_cpu(self) -> tuple[Tensor, LayerCache]:
        """Queries and cache of the twin; to be called before `launch`, which stores."""
        step, cache = self.step, on_cpu(self.cache)
        qkv = _to(self.qkv, torch.device("cpu"))
        whole = qkv.sum() if isinstance(qkv, Partials) else qkv.clone()
        norm = None if self.norm is None else self.norm.cpu()
        table = RotaryTable(self.table.cos.cpu(), self.table.sin.cpu())
        arrays = (step.query_start_loc, step.context_lens, step.block_tables, step.slot_mapping)
        starts, lens, blocks, slots = (each.cpu().numpy().astype(np.int32) for each in arrays)
        meta = AttentionMetadata.build(
            starts, lens, blocks, slots, step.num_decodes, BLOCK_SIZE, "cpu"
        )
        positions = step.positions.cpu().long()
        q = rope_and_store(whole, norm, EPS, table, positions, cache, meta, *self.sizes)
        return q, cache


def _launch_form(bench: Bench, form: Form) -> None:
    _problem(bench, form).launch()


def _problem(bench: Bench, form: Form) -> Problem:
    device, heads, kv_heads = bench.plan.device, 4, 2
    queries, contexts = ([1, 1, 300], [1, 129, 700]) if bench.plan.on_gpu else ([1, 2], [3, 66])
    num_decodes = len(queries) - 1
    if form.decode:
        num_decodes, queries = len(queries), [1] * len(queries)
    tables = random_tables(len(queries), max(contexts), BLOCK_SIZE, device)
    step = make_step(queries, contexts, num_decodes, tables, BLOCK_SIZE)
    cache = random_cache(
        tables.numel(), kv_heads, BLOCK_SIZE, form.head_dim, form.policy, form.dtype, device
    ).cache
    angles = torch.rand(max(contexts), form.rotary_dim // 2) * 6.28
    cos, sin = (torch.cat((part, part), -1).to(form.dtype) for part in (angles.cos(), angles.sin()))
    width = (heads + 2 * kv_heads) * form.head_dim
    norm = torch.rand(heads + kv_heads, form.head_dim).to(form.dtype) + 0.5 if form.norm else None
    return Problem(
        qkv=_to(_projection(step.num_tokens, width, form), device),
        norm=None if norm is None else norm.to(device),
        table=RotaryTable(cos.to(device), signed_sin(sin).to(device)),
        cache=cache,
        step=step,
        sizes=(heads, kv_heads, form.head_dim),
    )


def _check(bench: Bench, form: Form) -> None:
    problem = _problem(bench, form)
    expected, twin = problem.compute_on_cpu()
    q = problem.launch()
    error = worst_row_error(q.cpu().flatten(0, 1), expected.flatten(0, 1))
    bench.check(f"{form} queries", error, LIMITS[form.dtype])
    for name, ours, theirs in zip(("keys", "values"), held(problem.cache), held(twin), strict=True):
        error = worst_row_error(ours.cpu().reshape(1, -1), theirs.reshape(1, -1))
        bench.check(f"{form} {name}", error, STORED_LIMIT)


def _projection(num_tokens: int, width: int, form: Form) -> Tensor | Partials:
    if form.splits == 0:
        return torch.randn(num_tokens, width).to(form.dtype)
    parts = torch.randn(form.splits, num_tokens, width) / form.splits**0.5
    return Partials(parts, torch.randn(width).to(form.dtype), form.dtype)


def _to(qkv: Tensor | Partials, device: torch.device) -> Tensor | Partials:
    if isinstance(qkv, Tensor):
        return qkv.to(device)
    assert qkv.bias is not None
    return Partials(qkv.data.to(device), qkv.bias.to(device), qkv.dtype)
