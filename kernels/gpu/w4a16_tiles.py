"""How the W4A16 product is cut: tile shapes by number of rows, and parts along K.

kernels/gpu/tiles.py's tuned tiles come first, under "w4a16" and "w4a16_gated"; these are for
shapes it does not know.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from kernels.gpu import tiles

# More rows are multiplied by cuBLAS, after the weight is dequantised for them.
MAX_KERNEL_ROWS = 768
BUCKETS = (16, 32, 64, 128, 256, MAX_KERNEL_ROWS)  # of rows; one tile each
MAX_SPLITS = 8
PROGRAMS_PER_SM = 2
DEFAULT_NUM_SMS = 132  # an H100's or H200's


@dataclass(frozen=True, slots=True)
class Tile:
    """One compiled form."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    scale: Literal["after", "before"]
    splits: int | None = None  # None: as many as fill the GPU
    pdl: bool = False


DEFAULTS = {
    16: Tile(16, 128, 128, 4, 4, "after"),
    32: Tile(32, 128, 128, 8, 4, "after"),
    64: Tile(64, 128, 64, 4, 4, "before"),
    128: Tile(128, 128, 64, 4, 4, "before"),
    256: Tile(128, 256, 64, 8, 3, "before"),
    MAX_KERNEL_ROWS: Tile(128, 256, 64, 8, 3, "before"),
}
# float32: products on the CUDA cores, whose operands fill registers.
EXACT = Tile(16, 64, 32, 4, 2, "after")


def bucket_of(rows: int) -> int:
    return next(bucket for bucket in BUCKETS if rows <= bucket)


@cache
def choose_tile(
    kernel: str, n: int, k: int, group_size: int, dtype: torch.dtype, bucket: int, num_sms: int
) -> Tile:
    """The tile of "w4a16" or "w4a16_gated", with its number of splits."""
    tuned = tiles.lookup(kernel, n=n, k=k, group=group_size, m=bucket)
    tile = EXACT if dtype == torch.float32 else Tile(**tuned) if tuned else DEFAULTS[bucket]
    gated = kernel == "w4a16_gated"
    # A gated program's rows are two halves of whole tiles.
    tile = replace(
        tile,
        block_n=max(tile.block_n, 128) if gated else tile.block_n,
        block_k=choose_block_k(tile.block_k, k, group_size),
    )
    steps = -(-k // tile.block_k)
    programs = -(-bucket // tile.block_m) * -(-n // tile.block_n)
    splits = tile.splits or max(1, PROGRAMS_PER_SM * num_sms // programs)
    # The same number of steps for every part, and no part without any.
    steps_per_split = -(-steps // min(splits, MAX_SPLITS, steps))
    return replace(tile, splits=1 if gated else -(-steps // steps_per_split))


@cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_NUM_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_block_k(wanted: int, k: int, group_size: int) -> int:
    """At most `wanted` inputs that have one scale; whole ones of K where that is possible."""
    period = k if group_size == k else group_size
    fits = [size for size in (128, 64, 32) if size <= wanted and period % size == 0]
    return fits[0] if fits else min(wanted, 64)
