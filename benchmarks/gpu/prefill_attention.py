"""Attention of a whole prompt over its paged cache, beside PyTorch's causal attention."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.gpu.bench import Bench, Report, poisoned, worst_row_error
from benchmarks.gpu.caches import attention_reference, make_step, random_cache, random_tables
from benchmarks.gpu.decode_attention import sdpa
from kernels.gpu.prefill_attention import prefill_attention
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


def _measure(bench: Bench, length: int, policy: int) -> Report:
    plan = bench.plan
    tables = random_tables(1, length, plan.block_size, plan.device)
    paged = random_cache(
        tables.numel(), plan.num_kv_heads, plan.block_size, plan.head_dim, policy, plan.dtype,
        plan.device,
    )  # fmt: skip
    shape = (length, plan.num_heads, plan.head_dim)
    q = torch.randn(shape, device=plan.device, dtype=plan.dtype)
    out = torch.empty_like(q)
    scale = plan.head_dim**-0.5
    checked = min(CHECKED, length)
    last = make_step([checked], [length], 0, tables, plan.block_size)
    part, rows = torch.full_like(out[-checked:], torch.nan), q[-checked:].contiguous()
    with poisoned():
        prefill_attention(rows, paged.cache, last, part, scale=scale)
    expected = attention_reference(rows, paged, last, scale)
    error = worst_row_error(part.flatten(0, 1), expected.flatten(0, 1))
    bench.check(f"{POLICY_NAMES[policy]} prompt {length}", error, bench.limit)
    step = make_step([length], [length], 0, tables, plan.block_size)
    about_us = _flops(bench, length) / bench.matmul_rate * 1e6

    def call() -> None:
        prefill_attention(q, paged.cache, step, out, scale=scale)

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
        name = backend.name.removesuffix("_ATTENTION").lower()
        calls = [partial(sdpa, backend, q, k, v, causal=True)]
        about_us = _flops(bench, length) / bench.matmul_rate * 1e6
        us = bench.attempt(f"sdpa {name} {length}", partial(bench.measure, calls, about_us))
        if us is not None:
            times[name] = us
    return times


def _flops(bench: Bench, length: int) -> float:
    """Half of the square: the mask is causal."""
    plan = bench.plan
    return 2.0 * length * length * plan.num_heads * plan.head_dim
