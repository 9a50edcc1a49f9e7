"""Attention of a whole prompt over its paged cache, beside PyTorch's and FlashAttention-3.

The peers read the prompt's keys from contiguous tensors.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench, Report, poisoned, worst_row_error
from benchmarks.gpu.caches import (
    Paged,
    attention_reference,
    make_step,
    random_cache,
    random_tables,
)
from benchmarks.gpu.decode_attention import sdpa
from benchmarks.gpu.targets import FLASH_3
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICY_NAMES

POLICIES = (0, 8)
CHECKED = 256  # queries; the references of all take gigabytes


def run(bench: Bench) -> None:
    bench.warm_up()
    prompts: dict[str, Report] = {}
    bench.section["prompts"] = prompts
    for length in bench.plan.prompt_lens:
        row = prompts[str(length)] = {}
        for policy in POLICIES:
            name = POLICY_NAMES[policy]
            row[name] = bench.attempt(
                f"{name} prompt {length}", partial(_measure, bench, length, policy)
            )
            bench.save()
        row["peers"] = _measure_peers(bench, length)
        bench.save()
    # A library's fault could end what this process can do on the GPU.
    for length in bench.plan.prompt_lens:
        _measure_flash_attention_3(bench, length, prompts[str(length)]["peers"])
        bench.save()


@dataclass(frozen=True, slots=True)
class Prompt:
    """All queries of a prompt in a cache that holds its keys."""

    q: Tensor  # [T, Hq, D]
    paged: Paged
    step: GpuStep
    last: GpuStep  # of the last CHECKED queries
    scale: float

    @property
    def checked(self) -> Tensor:
        return self.q[-self.last.num_tokens :].contiguous()

    def reference(self) -> Tensor:
        """Of the checked queries: float64 [CHECKED * Hq, D]."""
        return attention_reference(self.checked, self.paged, self.last, self.scale).flatten(0, 1)


def _prompt(bench: Bench, length: int, policy: int) -> Prompt:
    plan = bench.plan
    tables = random_tables(1, length, plan.block_size, plan.device)
    paged = random_cache(
        tables.numel(), plan.num_kv_heads, plan.block_size, plan.head_dim, policy, plan.dtype,
        plan.device,
    )  # fmt: skip
    shape = (length, plan.num_heads, plan.head_dim)
    q = torch.randn(shape, device=plan.device, dtype=plan.dtype)
    step, last = (
        make_step([queries], [length], 0, tables, plan.block_size)
        for queries in (length, min(CHECKED, length))
    )
    return Prompt(q, paged, step, last, plan.head_dim**-0.5)


def _measure(bench: Bench, length: int, policy: int) -> Report:
    prompt = _prompt(bench, length, policy)
    q, cache, out = prompt.q, prompt.paged.cache, torch.empty_like(prompt.q)
    rows = prompt.checked
    part = torch.full_like(rows, torch.nan)
    with poisoned():
        prefill_attention(rows, cache, prompt.last, part, scale=prompt.scale)
    error = worst_row_error(part.flatten(0, 1), prompt.reference())
    bench.check(f"{POLICY_NAMES[policy]} prompt {length}", error, bench.limit)
    about_us = _flops(bench, length) / bench.matmul_rate * 1e6

    def call() -> None:
        prefill_attention(q, cache, prompt.step, out, scale=prompt.scale)

    us = bench.measure([call], about_us)
    return {"us": us, "tflop_s": _flops(bench, length) / us / 1e6}


def _measure_peers(bench: Bench, length: int) -> Report:
    plan = bench.plan
    backends = [SDPBackend.MATH]
    if plan.on_gpu:
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]

    def heads(count: int) -> Tensor:
        return torch.randn(1, count, length, plan.head_dim, device=plan.device, dtype=plan.dtype)

    q, k, v = heads(plan.num_heads), heads(plan.num_kv_heads), heads(plan.num_kv_heads)
    times: Report = {}
    for backend in backends:
        name = f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}"
        calls = [partial(sdpa, backend, q, k, v, causal=True)]
        about_us = _flops(bench, length) / bench.matmul_rate * 1e6
        us = bench.peer(f"{name} {length}", partial(bench.measure, calls, about_us))
        if us is not None:
            times[name] = us
    return times


def _measure_flash_attention_3(bench: Bench, length: int, times: Report) -> None:
    if not bench.peer(f"{FLASH_3} {length}", partial(peers.load, peers.FLASH_ATTENTION_3)):
        return
    prompt = _prompt(bench, length, 0)
    cache, expected = prompt.paged.cache, prompt.reference()
    assert isinstance(cache, Tensor)
    ordered = cache[prompt.step.block_tables[0]]  # [blocks, 2 Hkv, tokens, D]
    k, v = (half.transpose(1, 2).flatten(0, 1)[:length] for half in ordered.chunk(2, 1))

    def call() -> Tensor:
        out = peers.flash_attention_3(prompt.q, k, v, prompt.step, prompt.scale)
        return out.flatten(0, 1)[-len(expected) :]

    about_us = _flops(bench, length) / bench.matmul_rate * 1e6
    us = bench.time_peer(f"{FLASH_3} {length}", [call], expected, about_us)
    if us is not None:
        times[FLASH_3] = us


def _flops(bench: Bench, length: int) -> float:
    """Half of the square: the mask is causal."""
    plan = bench.plan
    return 2.0 * length * length * plan.num_heads * plan.head_dim
