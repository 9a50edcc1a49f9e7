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
from benchmarks.gpu.decode_attention import POLICIES
from kernels.attention import AttentionMetadata
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

    def __str__(self) -> str:
        name = f"{POLICIES[self.policy]} {str(self.dtype).removeprefix('torch.')}"
        name += f" D{self.head_dim} R{self.rotary_dim}"
        return name + f" parts {self.splits}" * (self.splits > 0) + " norm" * self.norm


def run(bench: Bench) -> None:
    for form in _forms(bench.plan.on_gpu):
        bench.attempt(str(form), partial(_check, bench, form))
        bench.save()


def _forms(on_gpu: bool) -> Iterator[Form]:
    if not on_gpu:
        yield Form(policy=4, dtype=torch.float32, head_dim=32, rotary_dim=32, splits=2, norm=True)
        return
    for policy, dtype in itertools.product(POLICIES, LIMITS):
        yield Form(policy=policy, dtype=dtype)
        yield Form(policy=policy, dtype=dtype, splits=4, norm=True)
    for policy in POLICIES:
        yield Form(policy=policy, head_dim=80, rotary_dim=32)


def _check(bench: Bench, form: Form) -> None:
    device, heads, kv_heads = bench.plan.device, 4, 2
    queries, contexts = ([1, 1, 100], [1, 129, 700]) if bench.plan.on_gpu else ([1, 2], [3, 66])
    tables = random_tables(len(queries), max(contexts), BLOCK_SIZE, device)
    step = make_step(queries, contexts, len(queries) - 1, tables, BLOCK_SIZE)
    paged = random_cache(
        tables.numel(), kv_heads, BLOCK_SIZE, form.head_dim, form.policy, form.dtype, device
    )
    twin = on_cpu(paged.cache)
    angles = torch.rand(max(contexts), form.rotary_dim // 2) * 6.28
    cos, sin = (torch.cat((part, part), -1).to(form.dtype) for part in (angles.cos(), angles.sin()))
    width = (heads + 2 * kv_heads) * form.head_dim
    qkv = _projection(step.num_tokens, width, form)
    weight = torch.rand(heads + kv_heads, form.head_dim).to(form.dtype) + 0.5 if form.norm else None
    arrays = (step.query_start_loc, step.context_lens, tables, step.slot_mapping)
    starts, lens, blocks, slots = (each.cpu().numpy().astype(np.int32) for each in arrays)
    meta = AttentionMetadata.build(starts, lens, blocks, slots, step.num_decodes, BLOCK_SIZE, "cpu")
    sizes = (heads, kv_heads, form.head_dim)
    whole = qkv.sum() if isinstance(qkv, Partials) else qkv.clone()
    positions = step.positions.cpu().long()
    twins = RotaryTable(cos, signed_sin(sin))
    expected = rope_and_store(whole, weight, EPS, twins, positions, twin, meta, *sizes)
    table = RotaryTable(cos.to(device), signed_sin(sin).to(device))
    placed = None if weight is None else weight.to(device)
    with poisoned():
        q = rope_and_store(
            _to(qkv, device), placed, EPS, table, step.positions, paged.cache, step, *sizes
        )
    limit = LIMITS[form.dtype]
    error = worst_row_error(q.cpu().flatten(0, 1), expected.flatten(0, 1))
    bench.check(f"{form} queries", error, limit)
    for name, ours, theirs in zip(("keys", "values"), held(paged.cache), held(twin), strict=True):
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
