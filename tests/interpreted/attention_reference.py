"""Attention over a paged cache in float64, plain torch, and random paged caches to try it on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gpu.step import GpuStep
from kernels.kv_layout import (
    LayerCache,
    QuantizedKV,
    dequantize_kv,
    join_nibbles,
    k_bytes,
    k_words,
    quantize_kv,
    split_nibbles,
    v_bytes,
    v_words,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the attention, and of the cache it reads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    policy: int = 0  # of the cache: a quant_policy
    dtype: torch.dtype = torch.float32  # of the activations, and of a plain cache


def attention_reference(
    q: Tensor,
    cache: LayerCache,
    step: GpuStep,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D] -> float64 [T, Hq, D]; rows of sequences without keys are 0."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    starts = step.query_start_loc.tolist()
    for seq, context_len in enumerate(step.context_lens.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        if context_len == 0:
            continue
        keys, values = gather_kv(cache, step, seq)
        heads = q[rows].double().transpose(0, 1)  # [Hq, queries, D]
        group = len(heads) // len(keys)
        keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
        scores = scale * heads @ keys.transpose(1, 2)
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        positions = torch.arange(context_len - heads.shape[1], context_len)
        distance = positions[:, None] - torch.arange(context_len)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.double()[:, None, None] * distance
        hidden = (distance < 0) | (distance >= (window or context_len))
        scores = scores.masked_fill(hidden, float("-inf"))
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


def gather_kv(cache: LayerCache, step: GpuStep, seq: int) -> tuple[Tensor, Tensor]:
    """The keys and values of a sequence, float64 [Hkv, context_len, D]."""
    context_len = int(step.context_lens[seq])
    blocks = step.block_tables[int(step.rows[seq])][: -(-context_len // step.block_size)].long()
    if isinstance(cache, Tensor):
        heads = cache[blocks].double().transpose(0, 1).flatten(1, 2)[:, :context_len]
    else:
        halves = (
            dequantize_kv(_u(u[blocks], cache), params, cache.policy)
            for u, params in zip(
                (k_bytes(cache.k), v_bytes(cache.v)),
                cache.params[blocks].unsqueeze(-1).view(torch.float16).chunk(2, 1),
                strict=True,
            )
        )
        heads = torch.cat(list(halves), 1).double().transpose(0, 1).flatten(1, 2)[:, :context_len]
    keys, values = heads.chunk(2)
    return keys, values


def _u(values: Tensor, cache: QuantizedKV) -> Tensor:
    return split_nibbles(values, cache.head_dim) if cache.policy == 4 else values


def random_step(
    context_lens: list[int],
    query_lens: list[int],
    block_size: int,
    *,
    max_context_len: int | None = None,
    seed: int = 0,
) -> GpuStep:
    """Decode rows are those before the first with more than one query. Blocks in random order."""
    generator = torch.Generator().manual_seed(seed)
    num_seqs = len(context_lens)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), num_seqs)
    rows = torch.randperm(num_seqs + 1, generator=generator)[:num_seqs].int()
    width = max(-(-n // block_size) for n in context_lens) + 1
    blocks = torch.randperm((num_seqs + 1) * width, generator=generator).int()
    tables = blocks.view(num_seqs + 1, width).clone()
    tables[:, -1] = 2**30  # an entry that no kernel may follow
    return GpuStep(
        input_ids=torch.zeros(int(starts[-1]), dtype=torch.int32),
        positions=torch.zeros(int(starts[-1]), dtype=torch.int32),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        query_start_loc=starts,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        rows=rows,
        block_tables=tables,
        num_decodes=num_decodes,
        max_query_len=max(query_lens[num_decodes:], default=0),
        max_context_len=max_context_len or max(context_lens),
        block_size=block_size,
    )


def random_cache(shape: Shape, step: GpuStep, seed: int = 0) -> LayerCache:
    """As many blocks as the step's tables name; slots that no sequence uses are poisoned.

    Poison is NaN in plain keys, values and in params; quantised values there are arbitrary.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = step.block_tables.shape[0] * step.block_tables.shape[1]
    size = (num_blocks, 2 * shape.num_kv_heads, shape.block_size, shape.head_dim)
    x = torch.randn(size, generator=generator) * 2 + torch.randn(*size[:3], 1, generator=generator)
    used = torch.zeros(num_blocks, shape.block_size, dtype=torch.bool)
    for row, context_len in zip(step.rows.tolist(), step.context_lens.tolist(), strict=True):
        for index, block in enumerate(step.block_tables[row, :-1].tolist()):
            used[block, : max(0, context_len - index * shape.block_size)] = True
    unused = ~used[:, None, :].expand(size[:3])
    if shape.policy == 0:
        return x.masked_fill(unused[..., None], float("nan")).to(shape.dtype)
    u, params = quantize_kv(x, shape.policy)
    params = params.masked_fill(unused[..., None], float("nan"))
    k, v = (join_nibbles(u) if shape.policy == 4 else u).chunk(2, 1)
    return QuantizedKV(
        k=k_words(k).contiguous(),
        v=v_words(v).contiguous(),
        params=params.contiguous().view(torch.int32).squeeze(-1),
        policy=shape.policy,
        head_dim=shape.head_dim,
    )
