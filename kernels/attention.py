"""Causal attention over the paged KV cache.

Layout: a layer's cache is [num_blocks, 2 * Hkv, block_size, D], the heads of the keys and then
those of the values; token p of a sequence is entry p % block_size of block
block_table[p // block_size]. A block keeps the tokens of one head side by side, so that gathering
a sequence's blocks head by head gives the [Hkv, keys, D] that the matrix products read, with no
transposition, and one gather serves keys and values.

Math: out = softmax(scale * q k^T + mask) v, softmax and sums in float32. Query head h reads key
head h // G, G = Hq / Hkv; a query at position p sees the keys p - window < i <= p.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_plan import DecodePlan, Int32Array, KeyBlocks, Planner, PrefillTile
from kernels.cpu import check_dense, library, library_for
from kernels.gpu.step import GpuStep
from kernels.kv_layout import LayerCache, QuantizedKV, heads_of

NATIVE_HEAD_DIMS = (32, 64, 96, 128, 256)  # those kernels/cpu/attention.cpp is compiled for


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where a step's queries and keys are; built once per step, used by every layer.

    Rows are sequences: decode rows (one query each) first, then prefill chunks. Sequence s owns
    the queries query_start_loc[s]:query_start_loc[s+1]; the last is at context_lens[s] - 1.
    What one layer derives from this is kept in `derived` for the layers after it.
    """

    query_start_loc: Int32Array  # [S+1]
    context_lens: Int32Array  # [S]
    block_tables: Int32Array  # [S, B]
    slot_mapping: Int32Array  # [T] block_id * block_size + offset
    num_decodes: int
    block_size: int
    device: str
    addresses: tuple[int, int, int]  # of block_tables, context_lens, slot_mapping: native kernels
    derived: "_Derived" = field(default_factory=lambda: _Derived({}, {}, {}, {}))

    @classmethod
    def build(
        cls,
        query_start_loc: Int32Array,
        context_lens: Int32Array,
        block_tables: Int32Array,
        slot_mapping: Int32Array,
        num_decodes: int,
        block_size: int,
        device: str,
    ) -> "AttentionMetadata":
        assert len(query_start_loc) == len(context_lens) + 1 == len(block_tables) + 1
        assert len(slot_mapping) == query_start_loc[-1]
        for array in (block_tables, context_lens, slot_mapping):  # native kernels read them
            assert array.dtype == np.int32
            assert array.strides[-1] == 4 or array.shape[-1] <= 1
        return cls(
            query_start_loc=query_start_loc,
            context_lens=context_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            num_decodes=num_decodes,
            block_size=block_size,
            device=device,
            addresses=(
                block_tables.ctypes.data,
                context_lens.ctypes.data,
                slot_mapping.ctypes.data,
            ),
        )


def store_kv(kv: Tensor, cache: LayerCache, meta: AttentionMetadata) -> None:
    """Write the new tokens' keys and values, kv [T, 2 * Hkv, D], into their slots."""
    if isinstance(cache, QuantizedKV):
        assert kv.shape[1:] == (2 * cache.num_kv_heads, cache.head_dim)
        assert cache.block_size == meta.block_size
        cache.store(kv, _store_rows(meta, 1)[:, 0])  # of one head: the slots
        return
    assert cache.shape[1:] == (kv.shape[1], meta.block_size, kv.shape[2])
    assert len(kv) == len(meta.slot_mapping)
    native = library_for(kv)
    if native is not None:
        assert kv.stride(1) == kv.shape[2]
        check_dense(cache, cache.shape)
        native.manta_store_kv(
            kv.data_ptr(), cache.data_ptr(), meta.addresses[2], *kv.shape[:2],
            kv.shape[2] * kv.itemsize, kv.stride(0) * kv.itemsize, meta.block_size,
        )  # fmt: skip
        return
    cache.view(-1, cache.shape[3]).index_put_((_store_rows(meta, kv.shape[1]),), kv)


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    meta: AttentionMetadata | GpuStep,
    scale: float,
    window: int | None,
) -> Tensor:
    """q [T, Hq, D] -> [T, Hq, D]; the step's own keys and values are stored already."""
    if isinstance(meta, GpuStep):
        return _paged_attention_gpu(q, cache, meta, scale, window)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, stored_dim = heads_of(cache)
    assert num_heads % num_kv_heads == 0
    assert head_dim == stored_dim
    grouped = q.view(num_tokens, num_kv_heads, -1, head_dim)  # [T, Hkv, G, D]
    out = grouped.new_empty(grouped.shape)
    if meta.num_decodes:
        decodes = grouped[: meta.num_decodes]
        if isinstance(cache, Tensor) and is_native(q, cache):
            _attend_decodes_native(decodes, cache, meta, scale, window, out)
        else:
            plan = _decode_plan(meta, grouped, window)
            _attend_decodes(decodes, cache, plan, scale, out)
    for tile in _prefill_tiles(meta, grouped, window):
        queries = slice(tile.first, tile.last)
        out[queries] = _attend_tile(grouped[queries], cache, tile.keys, scale)
    return out.view(q.shape)


def _paged_attention_gpu(
    q: Tensor, cache: LayerCache, step: GpuStep, scale: float, window: int | None
) -> Tensor:
    out = q.new_empty(q.shape)
    if step.num_decodes:
        from kernels.gpu.decode_attention import decode_attention

        decode_attention(q, cache, step, out, scale=scale, window=window)
    if step.max_query_len:
        from kernels.gpu.prefill_attention import prefill_attention

        prefill_attention(q, cache, step, out, scale=scale, window=window)
    return out


def _attend_decodes(
    q: Tensor, cache: LayerCache, plan: DecodePlan, scale: float, out: Tensor
) -> None:
    """One query of each sequence, q [S, Hkv, G, D]: G heads are the rows of one product."""
    rows, results = q, out
    if plan.order is not None:
        rows = q.index_select(0, plan.order)
        results = torch.empty_like(rows)
    for group in plan.groups:
        k, v = group.keys.gather(cache)
        seqs = slice(group.first, group.last)
        results[seqs] = F.scaled_dot_product_attention(
            rows[seqs], k, v, attn_mask=group.keys.mask, scale=scale
        )
    if plan.order is not None:
        out.index_copy_(0, plan.order, results)


def is_native(q: Tensor, cache: Tensor) -> bool:
    group_size = 2 * q.shape[1] // cache.shape[1]
    return (
        library_for(q) is not None
        and q.shape[2] in NATIVE_HEAD_DIMS
        and cache.shape[2] % 16 == 0
        and group_size <= 16
    )


def _attend_decodes_native(
    q: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float, window: int | None, out: Tensor
) -> None:
    native = library()
    assert native is not None
    assert q.stride(2) == q.shape[3]
    assert q.stride(1) == q.shape[2] * q.shape[3]
    check_dense(cache, (len(cache), 2 * q.shape[1], meta.block_size, q.shape[3]))
    native.manta_decode_attention(
        q.data_ptr(), cache.data_ptr(), *meta.addresses[:2], out.data_ptr(), *q.shape,
        meta.block_size, q.stride(0), meta.block_tables.strides[0] // 4, window or 0, scale,
        torch.get_num_threads(),
    )  # fmt: skip


def _attend_tile(q: Tensor, cache: LayerCache, keys: KeyBlocks, scale: float) -> Tensor:
    """Queries of one sequence, q [queries, Hkv, G, D]: key heads are the batch, G the heads."""
    _, num_kv_heads, group_size, head_dim = q.shape
    shape = (num_kv_heads, group_size, keys.num_keys, head_dim)
    k, v = (part.transpose(0, 1).expand(shape) for part in keys.gather(cache))
    attended = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3), k, v, attn_mask=keys.mask, scale=scale
    )
    return attended.permute(2, 0, 1, 3)


@dataclass(frozen=True, slots=True)
class _Derived:
    """By number of heads in a block, by window, by RotaryTable (kernels/rope.py).

    The caches of all layers have one shape.
    """

    store_rows: dict[int, Tensor]
    decode_plans: dict[int | None, DecodePlan]
    prefill_tiles: dict[int | None, list[PrefillTile]]
    angles: dict[object, tuple[Tensor, Tensor]]


def _store_rows(meta: AttentionMetadata, num_heads: int) -> Tensor:
    """int64 [T, heads]: where each new token's heads go in a cache viewed as [-1, D]."""
    known = meta.derived.store_rows
    if num_heads not in known:
        blocks, offsets = np.divmod(meta.slot_mapping.astype(np.int64)[:, None], meta.block_size)
        heads = blocks * num_heads + np.arange(num_heads)
        known[num_heads] = torch.from_numpy(heads * meta.block_size + offsets).to(meta.device)
    return known[num_heads]


def _decode_plan(meta: AttentionMetadata, q: Tensor, window: int | None) -> DecodePlan:
    known = meta.derived.decode_plans
    if window not in known:
        rows = slice(meta.num_decodes)
        planner = _planner(meta, q, window)
        known[window] = planner.decodes(meta.context_lens[rows], meta.block_tables[rows])
    return known[window]


def _prefill_tiles(meta: AttentionMetadata, q: Tensor, window: int | None) -> list[PrefillTile]:
    known = meta.derived.prefill_tiles
    if window not in known:
        planner, starts = _planner(meta, q, window), meta.query_start_loc.tolist()
        known[window] = [
            tile
            for seq in range(meta.num_decodes, len(meta.context_lens))
            for tile in planner.prefill_tiles(
                starts[seq],
                starts[seq + 1] - starts[seq],
                int(meta.context_lens[seq]),
                meta.block_tables[seq],
            )
        ]
    return known[window]


def _planner(meta: AttentionMetadata, q: Tensor, window: int | None) -> Planner:
    """For queries [T, Hkv, G, D]."""
    return Planner(
        block_size=meta.block_size,
        num_kv_heads=q.shape[1],
        head_dim=q.shape[3],
        dtype=q.dtype,
        device=meta.device,
        window=window,
    )
