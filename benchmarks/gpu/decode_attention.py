"""Decode attention over caches of every policy, beside PyTorch's and FlashAttention-3.

SDPA and flex_attention read as many keys from contiguous tensors, without block tables; SDPA also
after gathering them from ours, which is what it would have to do. FlashAttention-3 reads its own
paged cache. The floor is the cache's bytes at the read bandwidth.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench, Report, poisoned, worst_row_error
from benchmarks.gpu.caches import (
    Paged,
    attention_reference,
    make_step,
    random_cache,
    random_tables,
)
from benchmarks.gpu.targets import FLASH_3, FLEX, GATHERED
from benchmarks.gpu.weights import copies_of
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICY_NAMES, LayerCache

MAX_REFERENCE_CONTEXT = 2048  # float64 references of longer ones take seconds each
CHECKED = 2  # sequences of a peer's


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
    # A library's fault could end what this process can do on the GPU, and a compiler takes long.
    for measure in (_measure_flash_attention_3, _measure_flex):
        for context in bench.plan.context_lens:
            measure(bench, context, contexts[str(context)]["peers"])
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


@dataclass(frozen=True, slots=True)
class PeerProblem:
    """Full contexts in a plain cache, and what attention of the first sequences should be."""

    q: Tensor  # [S, Hq, D]
    paged: Paged
    step: GpuStep
    scale: float
    expected: Tensor  # float64 [CHECKED * Hq, D]
    floor_us: float

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Contiguous [S, Hkv, context, D]."""
        cache, tables = self.paged.cache, self.step.block_tables
        assert isinstance(cache, Tensor)
        heads = torch.arange(cache.shape[1], device=cache.device)
        found = cache[tables[:, None], heads[None, :, None]]  # [S, 2 Hkv, blocks, tokens, D]
        k, v = found.flatten(2, 3)[:, :, : self.step.max_context_len].chunk(2, 1)
        return k, v

    def as_rows(self, k: Tensor) -> Tensor:
        """The queries of a key head as rows of one head."""
        return self.q.view(len(k), k.shape[1], -1, k.shape[3])

    def time(self, bench: Bench, name: str, call: Callable[[], Tensor]) -> float | None:
        label = f"{name} {self.step.max_context_len}"
        return bench.time_peer(label, [call], self.expected, self.floor_us)


def _peer_problem(bench: Bench, context: int) -> PeerProblem:
    plan = bench.plan
    tables = random_tables(plan.num_seqs, context, plan.block_size, plan.device)
    paged = random_cache(
        tables.numel(), plan.num_kv_heads, plan.block_size, plan.head_dim, 0, plan.dtype,
        plan.device,
    )  # fmt: skip
    shape = (plan.num_seqs, plan.num_heads, plan.head_dim)
    q = torch.randn(shape, device=plan.device, dtype=plan.dtype)
    scale = plan.head_dim**-0.5
    steps = [
        make_step([1] * count, [context] * count, count, tables, plan.block_size)
        for count in (CHECKED, plan.num_seqs)
    ]
    expected = attention_reference(q[:CHECKED], paged, steps[0], scale).flatten(0, 1)
    floor_us = paged.num_bytes / bench.read_rate * 1e6
    return PeerProblem(q, paged, steps[1], scale, expected, floor_us)


def _measure_peers(bench: Bench, context: int) -> Report:
    """Microseconds by backend; a group's queries as rows of one head, or grouped by PyTorch."""
    backends = [SDPBackend.MATH]
    if bench.plan.on_gpu:
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    problem = _peer_problem(bench, context)
    k, v = (each.contiguous() for each in problem.keys_and_values())
    forms = {"rows": problem.as_rows(k), "gqa": problem.q.unsqueeze(2)}
    times: Report = {}
    for backend, (form, q) in itertools.product(backends, forms.items()):
        label = f"SDPA {backend.name.removesuffix('_ATTENTION').lower()} {form}"
        us = problem.time(bench, label, partial(sdpa, backend, q, k, v))
        if us is not None:
            times[label] = us

    def gather_and_attend() -> Tensor:
        return sdpa(backends[0], forms["rows"], *problem.keys_and_values())

    us = problem.time(bench, GATHERED, gather_and_attend)
    return times if us is None else times | {GATHERED: us}


def _measure_flash_attention_3(bench: Bench, context: int, times: Report) -> None:
    """The faster of planning in each layer and of planning once a step, before what is timed."""
    if bench.peer(f"{FLASH_3} {context}", partial(peers.load, peers.FLASH_ATTENTION_3)):
        problem = _peer_problem(bench, context)
        cache = problem.paged.cache
        assert isinstance(cache, Tensor)
        k, v = (half.transpose(1, 2).contiguous() for half in cache.chunk(2, 1))
        q, step, attend = problem.q, problem.step, peers.flash_attention_3
        found = [problem.time(bench, FLASH_3, partial(attend, q, k, v, step, problem.scale))]
        plan = bench.peer(
            f"{FLASH_3} plan {context}", partial(peers.flash_attention_3_plan, q, k, step)
        )
        if plan is not None:
            call = partial(attend, q, k, v, step, problem.scale, plan)
            found.append(problem.time(bench, f"{FLASH_3} planned", call))
        if measured := [us for us in found if us is not None]:
            times[FLASH_3] = min(measured)


def _measure_flex(bench: Bench, context: int, times: Report) -> None:
    """At one context: each one's kernel takes seconds to compile."""
    if not bench.plan.on_gpu or context != bench.plan.context_lens[0]:
        return
    from torch.nn.attention.flex_attention import flex_attention

    problem = _peer_problem(bench, context)
    k, v = (each.contiguous() for each in problem.keys_and_values())
    compiled = torch.compile(flex_attention, dynamic=False)
    q = problem.q.unsqueeze(2)
    call = partial(compiled, q, k, v, scale=problem.scale, enable_gqa=True)
    us = problem.time(bench, FLEX, call)
    if us is not None:
        times[FLEX] = us


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
