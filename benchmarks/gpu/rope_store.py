"""Times of the kernel between the qkv projection and attention, for steps of decode and of prompts.

The floor is what must be read and written once, at the read bandwidth. A decode step's parts come
from the L2, where the projection has just left them.
"""

from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Report
from benchmarks.gpu.caches import make_step, random_cache, random_tables
from kernels.kv_layout import POLICY_NAMES, bytes_per_token
from kernels.partials import Partials
from kernels.rope import RotaryTable, rope_and_store

SPLITS = 4  # of a decode step's projection


def run(bench: Bench) -> None:
    bench.warm_up()
    times: Report = {}
    bench.section["times"] = times
    for policy, name in POLICY_NAMES.items():
        for kind, num_tokens in (("decode", bench.plan.num_seqs), ("prompt", 4096)):
            label = f"{kind} {name}"
            count = num_tokens if bench.plan.on_gpu else 2
            action = partial(_measure, bench, policy, count, SPLITS if kind == "decode" else 0)
            times[label] = bench.attempt(label, action)
        bench.save()


def _measure(bench: Bench, policy: int, num_tokens: int, splits: int) -> Report:
    """One prompt; without parts the projection is a tensor of the activations' dtype."""
    plan = bench.plan
    device, dtype, size = plan.device, plan.dtype, plan.head_dim
    sizes = (plan.num_heads, plan.num_kv_heads, size)
    width = (plan.num_heads + 2 * plan.num_kv_heads) * size
    tables = random_tables(1, num_tokens, plan.block_size, device)
    step = make_step([num_tokens], [num_tokens], 0, tables, plan.block_size)
    cache = random_cache(
        tables.numel(), plan.num_kv_heads, plan.block_size, size, policy, dtype, device
    ).cache
    angles = torch.rand(num_tokens, size, device=device)
    table = RotaryTable(angles.cos().to(dtype), angles.sin().to(dtype))
    data = torch.randn(num_tokens, width, device=device, dtype=dtype)
    if splits:
        data = torch.randn(splits, num_tokens, width, device=device)
    qkv = Partials(data, None, dtype) if splits else data
    token = bytes_per_token(size, policy) if policy else 2 * size * dtype.itemsize
    written = plan.num_heads * size * dtype.itemsize + plan.num_kv_heads * token
    num_bytes = data.nbytes + num_tokens * written
    floor_us = num_bytes / bench.read_rate * 1e6
    call = partial(rope_and_store, qkv, None, 1e-5, table, step.positions, cache, step, *sizes)
    us = bench.measure([call], floor_us)
    return {"us": us, "floor_us": floor_us, "tb_s": num_bytes / us / 1e6}
