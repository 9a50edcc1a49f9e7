"""Tiles of decode attention: tuned ones, defaults, what tuning tries; and the number of splits."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton

from kernels.gpu import tiles
from kernels.kv_layout import POLICY_NAMES, features_per_token, policy_of

MAX_SPLITS = 64
# A long sequence among many short ones, where each has a program per KV head, would keep the rest
# of the GPU waiting for the few that it has: with more keys than these they are split once more.
# Not oftener: a graph's splits are those of session_len, and every row has them. With 16 of them at
# 131072, 256 rows of 1024 keys, Llama-3-8B, would have one tile per program, and write and read
# 134 MB of parts beside 1.1 GB of keys and values; with two, 17 MB. What that leaves to a lone
# sequence of 131072 keys is 34 MB per program: about 0.5 ms per layer at the 65 GB/s that 64 KiB on
# their way in a microsecond are (reckoned, not measured).
MAX_SPLIT_KEYS = 8192
# What a program may have on its way to shared memory, of the 163 KiB of sm_80.
MAX_TILE_BYTES = 144 * 1024

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernels are compiled for, beside their tile."""

    num_kv_heads: int
    group: int  # query heads per KV head
    head_dim: int
    block_size: int
    policy: int
    dtype: torch.dtype  # of the queries, and of plain keys and values

    @property
    def kv(self) -> str:
        """In keys and labels: a plain cache goes by its data type."""
        if self.policy:
            return POLICY_NAMES[self.policy]
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    @property
    def width(self) -> int:
        """Columns of keys as they are loaded: a power of two."""
        if self.policy == 0:
            return int(triton.next_power_of_2(self.head_dim))
        return int(triton.next_power_of_2(features_per_token(self.head_dim, self.policy)))


@dataclass(frozen=True, slots=True)
class Tile:
    tokens: int  # per step of the loop; divides block_size
    rows: int  # query heads of a program: 16 or more, for quantised caches 8 or more
    num_warps: int
    num_stages: int
    programs_per_sm: int  # so many splits as make it

    def num_bytes(self, form: Form) -> int:
        """Of the keys and values that `num_stages` keep in shared memory."""
        itemsize = form.dtype.itemsize if form.policy == 0 else 1
        return max(1, self.num_stages - 1) * 2 * self.tokens * form.width * itemsize


def tile_for(form: Form) -> Tile:
    found = tiles.lookup(
        "decode_attention",
        head_dim=form.head_dim,
        group=form.group,
        kv=form.kv,
        block_size=form.block_size,
    )
    return default_tile(form) if found is None else Tile(**found)


def default_tile(form: Form) -> Tile:
    """Chosen from what the compiler makes of them (Triton 3.6 and 3.9), not yet from times."""
    rows = 16 if form.group <= 16 else 32
    # Three stages keep two tiles on their way: 64 KiB of bf16 per program at D = 128, and three
    # programs' registers and shared memory fit an SM.
    tokens = 32 if form.policy == 0 and form.head_dim > 128 else 64
    if form.dtype == torch.float32:  # products without matrix units; larger tiles spill
        return Tile(min(form.block_size, 16), rows, 4, 3, programs_per_sm=3)
    tokens = min(form.block_size, tokens)
    # 16 tokens each: with half of that a tile costs half as much again. More where D is large, for
    # registers.
    num_warps = 4 if form.head_dim > 128 else tokens // 16
    # One tile of 32 KiB on its way is enough, and with two Triton 3.6 takes 107 KiB of the 99 that
    # a block of sm_86 and sm_89 may have.
    num_stages = 2 if form.policy and form.width > 128 else 3
    return Tile(tokens, rows, num_warps, num_stages, programs_per_sm=12 // num_warps)


def candidates(kernel: str, **key: Any) -> list[dict[str, Any]]:
    """For a key of `tile_for`; the default first."""
    assert kernel == "decode_attention"
    form = form_of(key)
    default = default_tile(form)
    # Eight rows: half the work on scores, and matrix instructions that not every Triton feeds
    # from registers (3.6 does not).
    rows = [8, 16] if form.policy and form.group <= 8 else [default.rows]
    tried = [
        Tile(tokens, num_rows, num_warps, num_stages, 12 // num_warps)
        for tokens in ((64, 128) if form.policy else (32, 64, 128))
        for num_rows in rows
        for num_warps in (2, 4, 8)
        for num_stages in (2, 3, 4)
        if form.block_size % tokens == 0 and num_warps in (tokens // 16, tokens // 32)
    ]
    tried = [default, *tried, *(replace(default, programs_per_sm=count) for count in (2, 4, 8))]
    fitting = [tile for tile in tried if tile.num_bytes(form) <= MAX_TILE_BYTES]
    return [asdict(tile) for tile in dict.fromkeys(fitting)]


def form_of(key: dict[str, Any]) -> Form:
    """Of a key; the number of heads, which it does not tell, is that of Llama-3-8B."""
    return Form(
        num_kv_heads=8,
        group=key["group"],
        head_dim=key["head_dim"],
        block_size=key["block_size"],
        policy=policy_of(key["kv"]),
        dtype=_DTYPES.get(key["kv"], torch.bfloat16),
    )


def num_splits(programs: int, max_keys: int, num_sms: int, tile: Tile) -> int:
    """As many as run at once, up to twice that for rows of more than MAX_SPLIT_KEYS keys."""
    num_tiles = -(-max_keys // tile.tokens)
    filling = max(1, tile.programs_per_sm * num_sms // programs)
    wanted = max(filling, min(2 * filling, -(-max_keys // MAX_SPLIT_KEYS)))
    return max(1, min(wanted, num_tiles, MAX_SPLITS))
