"""Random paged caches of every policy, steps that read them, and float64 attention over them."""

from dataclasses import dataclass, replace

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
class Paged:
    """A layer's cache, and the keys and values it holds: float32 [num_blocks, Hkv, tokens, D]."""

    cache: LayerCache
    keys: Tensor
    values: Tensor

    @property
    def num_bytes(self) -> int:
        cache = self.cache
        tensors = [cache] if isinstance(cache, Tensor) else [cache.k, cache.v, cache.params]
        return sum(t.numel() * t.element_size() for t in tensors)


def random_cache(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    policy: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Paged:
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    if policy == 0:
        return Paged(torch.cat((keys, values), 1), keys.float(), values.float())
    (k, k_params), (v, v_params) = quantize_kv(keys, policy), quantize_kv(values, policy)
    params = torch.cat((k_params, v_params), 1).view(torch.int32).squeeze(-1)
    k_bytes, v_bytes = (join_nibbles(u) if policy == 4 else u for u in (k, v))
    cache = QuantizedKV(
        k=k_words(k_bytes).contiguous(),
        v=v_words(v_bytes).contiguous(),
        params=params.contiguous(),
        policy=policy,
        head_dim=head_dim,
    )
    return Paged(cache, dequantize_kv(k, k_params, policy), dequantize_kv(v, v_params, policy))


def on_cpu(cache: LayerCache) -> LayerCache:
    """A copy."""
    if isinstance(cache, Tensor):
        return cache.cpu().clone()
    tensors = {name: getattr(cache, name).cpu().clone() for name in ("k", "v", "params")}
    return replace(cache, **tensors)


def held(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """float32 keys and values [num_blocks, Hkv, tokens, D]."""
    if isinstance(cache, Tensor):
        keys, values = cache.float().chunk(2, 1)
        return keys, values
    halves = cache.params.contiguous().view(torch.float16)
    params = halves.view(*cache.params.shape, 2).chunk(2, 1)
    parts = []
    for u, param in zip((k_bytes(cache.k), v_bytes(cache.v)), params, strict=True):
        values = split_nibbles(u, cache.head_dim) if cache.policy == 4 else u
        parts.append(dequantize_kv(values, param, cache.policy))
    return parts[0], parts[1]


def make_step(
    query_lens: list[int],
    context_lens: list[int],
    num_decodes: int,
    block_tables: Tensor,
    block_size: int,
) -> GpuStep:
    """Sequence s has the last query_lens[s] of its context_lens[s] tokens in this step; a context
    of 0 makes a row of padding.
    """
    device = block_tables.device
    positions = [
        position
        for queries, context in zip(query_lens, context_lens, strict=True)
        for position in range(context - queries, context)
    ]
    starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rows = [row for row, queries in enumerate(query_lens) for _ in range(queries)]
    places = torch.tensor(positions, device=device)
    slots = block_tables[rows, places // block_size].long() * block_size + places % block_size
    return GpuStep(
        input_ids=torch.zeros(len(positions), dtype=torch.int32, device=device),
        positions=int32(positions),
        slot_mapping=slots.where(places >= 0, -1),
        query_start_loc=int32(starts),
        context_lens=int32(context_lens),
        rows=torch.arange(len(query_lens), dtype=torch.int32, device=device),
        block_tables=block_tables,
        num_decodes=num_decodes,
        max_query_len=max(query_lens[num_decodes:], default=0),
        max_context_len=max(context_lens),
        block_size=block_size,
    )


def random_tables(num_seqs: int, context: int, block_size: int, device: torch.device) -> Tensor:
    """int32 [num_seqs, blocks]: every block once, in no order."""
    blocks = -(-context // block_size)
    return torch.randperm(num_seqs * blocks, device=device).int().view(num_seqs, blocks)


def attention_reference(
    q: Tensor,
    paged: Paged,
    step: GpuStep,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D] -> float64 [T, Hq, D], one sequence at a time; 0 where there is no key."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // paged.keys.shape[1]
    starts = step.query_start_loc.tolist()
    for row, context in enumerate(step.context_lens.tolist()):
        queries = slice(starts[row], starts[row + 1])
        blocks = step.block_tables[row].long()
        k, v = (
            # [blocks, Hkv, tokens, D] -> [Hq, context, D]
            each[blocks].transpose(0, 1).flatten(1, 2)[:, :context].double()
            .repeat_interleave(group, 0)
            for each in (paged.keys, paged.values)
        )  # fmt: skip
        scores = q[queries].double().transpose(0, 1) @ k.transpose(1, 2) * scale
        ahead = (  # how far a key is before its query
            torch.arange(context - (queries.stop - queries.start), context, device=q.device)[
                :, None
            ]
            - torch.arange(context, device=q.device)[None, :]
        )
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.double()[:, None, None] * ahead
        hidden = (ahead < 0) | (ahead >= (window or context))
        p = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        out[queries] = (p @ v).transpose(0, 1)
    return out
