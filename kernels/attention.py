"""Causal attention over the paged KV cache.

A step's rows are sequences: decode rows (one query each) first, then prefill chunks. Sequence s
owns queries query_start_loc[s]:query_start_loc[s+1]; its last query sits at position
context_lens[s] - 1. Token p of a sequence lives in slot block_table[p // block_size] * block_size
+ p % block_size of k_cache and v_cache [num_blocks, block_size, Hkv, D].
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where a step's queries and keys are; built once per step, used by every layer."""

    query_start_loc: list[int]  # [S+1]
    context_lens: list[int]  # [S]
    slot_mapping: Tensor  # int64 [T]
    context_slots: list[Tensor]  # per sequence, int64 [context_len]
    num_decodes: int

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
        offsets = np.arange(block_size)
        slots = [
            (table[:, None].astype(np.int64) * block_size + offsets).reshape(-1)[:length]
            for table, length in zip(block_tables, context_lens, strict=True)
        ]
        return cls(
            query_start_loc=query_start_loc.tolist(),
            context_lens=context_lens.tolist(),
            slot_mapping=torch.from_numpy(slot_mapping.astype(np.int64)).to(device),
            context_slots=[torch.from_numpy(each).to(device) for each in slots],
            num_decodes=num_decodes,
        )


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata
) -> None:
    """Write the new tokens' k and v [T, Hkv, D] into their slots."""
    k_cache.view(-1, *k.shape[1:])[meta.slot_mapping] = k
    v_cache.view(-1, *v.shape[1:])[meta.slot_mapping] = v


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None,
) -> Tensor:
    """q [T, Hq, D] -> [T, Hq, D]; `window`: a query sees keys at most window - 1 back."""
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    out = torch.empty_like(q)
    for row, slots in enumerate(meta.context_slots):
        first, last = meta.query_start_loc[row], meta.query_start_loc[row + 1]
        length = meta.context_lens[row]
        position = torch.arange(length - (last - first), length, device=q.device).unsqueeze(1)
        distance = position - torch.arange(length, device=q.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        attended = F.scaled_dot_product_attention(
            q[first:last].transpose(0, 1).unsqueeze(0),
            keys[slots].transpose(0, 1).unsqueeze(0),
            values[slots].transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        out[first:last] = attended[0].transpose(0, 1)
    return out
