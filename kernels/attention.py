"""Causal attention over the paged KV cache.

Layout: k_cache and v_cache are [num_blocks, Hkv, block_size, D]; token p of a sequence is entry
p % block_size of block block_table[p // block_size]. A block keeps the tokens of one head side by
side, so that gathering a sequence's blocks head by head gives the [Hkv, keys, D] that the matrix
products read, with no transposition.

Math: out = softmax(scale * q k^T + mask) v, softmax and sums in float32. Query head h reads key
head h // G, G = Hq / Hkv; a query at position p sees the keys p - window < i <= p.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_plan import DecodeGroup, Int32Array, Planner, PrefillTile


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
    derived: "_Derived" = field(default_factory=lambda: _Derived({}, {}))

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
        return cls(
            query_start_loc=query_start_loc,
            context_lens=context_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            num_decodes=num_decodes,
            block_size=block_size,
            device=device,
        )


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata
) -> None:
    """Write the new tokens' k and v [T, Hkv, D] into their slots."""
    assert k_cache.shape[1:] == (k.shape[1], meta.block_size, k.shape[2])
    rows = (_store_rows(meta, k.shape[1]),)
    k_cache.view(-1, k.shape[2]).index_put_(rows, k)
    v_cache.view(-1, v.shape[2]).index_put_(rows, v)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None,
) -> Tensor:
    """q [T, Hq, D] -> [T, Hq, D]; the step's own keys and values are stored already."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    assert q.shape[1] % num_kv_heads == 0
    assert q.shape[2] == head_dim
    plan = _plan(meta, k_cache, window)
    keys = k_cache.view(-1, meta.block_size * head_dim)
    values = v_cache.view(-1, meta.block_size * head_dim)
    grouped = q.view(q.shape[0], num_kv_heads, -1, head_dim)  # [T, Hkv, G, D]
    out = torch.empty_like(grouped)
    for group in plan.decode_groups:
        _attend_decodes(grouped, keys, values, group, scale, out)
    for tile in plan.prefill_tiles:
        _attend_tile(grouped, keys, values, tile, scale, out)
    return out.flatten(1, 2)


def _attend_decodes(
    q: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, scale: float, out: Tensor
) -> None:
    """The G query heads of a key head are the rows of one product."""
    k, v = group.keys.gather(keys, q.shape[3]), group.keys.gather(values, q.shape[3])
    rows = q.index_select(0, group.queries)  # [R, Hkv, G, D]
    attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=group.keys.mask, scale=scale)
    out.index_copy_(0, group.queries, attended)


def _attend_tile(
    q: Tensor, keys: Tensor, values: Tensor, tile: PrefillTile, scale: float, out: Tensor
) -> None:
    """Key heads are the batch and G the heads, which all read the same keys."""
    _, num_kv_heads, group_size, head_dim = q.shape
    shape = (num_kv_heads, group_size, tile.keys.num_keys, head_dim)
    k = tile.keys.gather(keys, head_dim).transpose(0, 1).expand(shape)
    v = tile.keys.gather(values, head_dim).transpose(0, 1).expand(shape)
    rows = q[tile.first : tile.last].permute(1, 2, 0, 3)  # [Hkv, G, queries, D]
    attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=tile.keys.mask, scale=scale)
    out[tile.first : tile.last] = attended.permute(2, 0, 1, 3)


@dataclass(frozen=True, slots=True)
class _Plan:
    decode_groups: list[DecodeGroup]
    prefill_tiles: list[PrefillTile]


@dataclass(frozen=True, slots=True)
class _Derived:
    store_rows: dict[int, Tensor]  # by number of kv heads
    plans: dict[Planner, _Plan]


def _store_rows(meta: AttentionMetadata, num_kv_heads: int) -> Tensor:
    """int64 [T, Hkv]: where each new token's heads go in a cache viewed as [-1, D]."""
    known = meta.derived.store_rows
    if num_kv_heads not in known:
        blocks, offsets = np.divmod(meta.slot_mapping.astype(np.int64)[:, None], meta.block_size)
        heads = blocks * num_kv_heads + np.arange(num_kv_heads)
        rows = torch.from_numpy(heads * meta.block_size + offsets)
        known[num_kv_heads] = rows.to(meta.device)
    return known[num_kv_heads]


def _plan(meta: AttentionMetadata, cache: Tensor, window: int | None) -> _Plan:
    planner = Planner(
        block_size=meta.block_size,
        num_kv_heads=cache.shape[1],
        head_dim=cache.shape[3],
        dtype=cache.dtype,
        device=meta.device,
        window=window,
    )
    known = meta.derived.plans
    if planner not in known:
        decodes = meta.num_decodes
        groups = planner.decode_groups(meta.context_lens[:decodes], meta.block_tables[:decodes])
        starts = meta.query_start_loc.tolist()
        tiles: list[PrefillTile] = []
        for seq in range(decodes, len(meta.context_lens)):
            num_queries = starts[seq + 1] - starts[seq]
            tiles += planner.prefill_tiles(
                starts[seq], num_queries, int(meta.context_lens[seq]), meta.block_tables[seq]
            )
        known[planner] = _Plan(list(groups), tiles)
    return known[planner]
