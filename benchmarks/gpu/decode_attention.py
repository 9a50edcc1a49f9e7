"""Decode attention over caches of every policy, beside PyTorch's attention over contiguous ones.

Peers read the same number of keys without block tables. The floor is the cache's bytes at the
read bandwidth.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import Bench, Report, poisoned, worst_row_error
from benchmarks.gpu.caches import attention_reference, make_step, random_cache, random_tables
from benchmarks.gpu.weights import copies_of
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICY_NAMES, LayerCache

MAX_REFERENCE_CONTEXT = 2048  # float64 references of longer ones take seconds each


def run(bench: Bench) -> None:
    bench.warm_up()
    contexts: dict[str, Report] = {}
    bench.section["contexts"] = contexts
    for context in bench.plan.context_lens:
        row = contexts[str(context)] = {}
        for policy, name in POLICY_NAMES.items():
            row |= {name: bench.attempt(f"{name} context {context}",
                                        partial(_measure, bench, context, policy))}  # fmt: skip
            bench.save()
        row["peers"] = _measure_peers(bench, context)
        bench.save()


def _measure(bench: Bench, context: int, policy: int) -> Report:
    """Full contexts timed; ragged ones checked."""
    plan = bench.plan
    tables = random_tables(plan.num_seqs, context, plan.block_size, plan.device)
    paged = random_cache(
        tables.numel(), plan.num_kv_heads, plan.block_size, plan.head_dim, policy, plan.dtype,
        plan.device,
    )  # fmt: skip
    shape = (plan.num_seqs, plan.num_heads, plan.head_dim)
    q = torch.randn(shape, device=plan.device, dtype=plan.dtype)
    out = torch.empty_like(q)
    scale = plan.head_dim**-0.5

    def call(cache: LayerCache, step: GpuStep) -> Tensor:
        decode_attention(q, cache, step, out, scale=scale)
        return out

    ones = [1] * plan.num_seqs
    if context <= MAX_REFERENCE_CONTEXT:
        lens = torch.randint(1, context + 1, (plan.num_seqs,)).tolist()
        lens[:2] = 1, context - 1
        ragged = make_step(ones, lens, plan.num_seqs, tables, plan.block_size)
        out.fill_(torch.nan)
        with poisoned():
            call(paged.cache, ragged)
        expected = attention_reference(q, paged, ragged, scale)
        label = f"{POLICY_NAMES[policy]} context {context}"
        bench.check(label, worst_row_error(out.flatten(0, 1), expected.flatten(0, 1)), bench.limit)
    full = make_step(ones, [context] * plan.num_seqs, plan.num_seqs, tables, plan.block_size)
    floor_us = paged.num_bytes / bench.read_rate * 1e6
    caches = copies_of(paged.cache, bench.rotation(paged.num_bytes))
    us = bench.measure([partial(call, cache, full) for cache in caches], floor_us)
    return {"us": us, "floor_us": floor_us, "tb_s": paged.num_bytes / us / 1e6}


def _measure_peers(bench: Bench, context: int) -> Report:
    """Microseconds by backend; a group's queries as rows of one head, or grouped by PyTorch."""
    plan = bench.plan
    backends = [SDPBackend.MATH]
    if plan.on_gpu:
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    shape = (plan.num_seqs, plan.num_kv_heads, context, plan.head_dim)
    k, v = (torch.randn(shape, device=plan.device, dtype=plan.dtype) for _ in range(2))
    group = plan.num_heads // plan.num_kv_heads
    rows = torch.randn_like(k[:, :, :group])
    heads = rows.reshape(plan.num_seqs, plan.num_heads, 1, plan.head_dim)
    floor_us = 2 * k.numel() * k.element_size() / bench.read_rate * 1e6
    times: Report = {}
    for backend, (form, q) in itertools.product(backends, {"rows": rows, "gqa": heads}.items()):
        label = f"{backend.name.removesuffix('_ATTENTION').lower()} {form}"
        calls = [partial(sdpa, backend, q, k, v)]
        us = bench.attempt(f"sdpa {label} {context}", partial(bench.measure, calls, floor_us))
        if us is not None:
            times[label] = us
    return times


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
