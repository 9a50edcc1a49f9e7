"""How the W4A16 product is cut: tile shapes by number of rows, and parts along K.

kernels/gpu/tiles.py's tuned tiles come first, under "w4a16" and "w4a16_gated", by n, k, group and
m, a bucket of rows; these are for shapes it does not know.
"""

from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal, TypeAlias

import torch

from kernels.gpu import tiles
from kernels.gpu.chip import HOPPER, Chip

# More rows are multiplied by cuBLAS, after the weight is dequantised for them: one reading of the
# weight in 4 bits and a writing in 16, against unpacking it once per tile of rows.
MAX_KERNEL_ROWS = 768
BUCKETS = (4, 16, 32, 64, 128, 256, MAX_KERNEL_ROWS)  # of rows; one tile each
MAX_SPLITS = 8
PROGRAMS_PER_SM = 2


Scale: TypeAlias = Literal["after", "before"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One compiled form."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    scale: Scale
    splits: int | None = None  # None: as many as fill the GPU


# Compiled, not timed: instructions per weight and lane of the loop, with zeros, by Triton 3.6 for
# sm_90; an H200 has time for 4.0 while the weights arrive. Registers allow 2 to 5 programs an SM.
#   16 x  64 x 128  3.52        32 x 128 x 128  2.60        128 x 128 x 64  4.45
#   16 x 128 x 128  2.43        64 x 128 x 128  3.50        128 x 256 x 64  4.09
# In groups of 64 the second is 3.23 and of 32 3.51, two and four groups in a step.
# 64 outputs where a few rows of x are read: as many programs with half the parts to add up; of 6
# stages, because a step is 4 KiB and the memory wants 26 KiB on the way to each SM. From
# 16 rows on x weighs as much as 64 outputs' weights, and every program reads it from L2. "before"
# needs 128 outputs per 4 warps: with 64 the scales' layout costs 6 instructions.
DEFAULTS = {
    4: Tile(16, 64, 128, 4, 6, "after"),
    16: Tile(16, 128, 128, 4, 4, "after"),
    32: Tile(32, 128, 128, 4, 4, "after"),
    64: Tile(64, 128, 128, 4, 3, "before"),
    128: Tile(128, 128, 64, 4, 4, "before"),
    256: Tile(128, 256, 64, 8, 3, "before"),
    MAX_KERNEL_ROWS: Tile(128, 256, 64, 8, 3, "before"),
}
# Without `has_wide_products` both operands of a product are in registers, and wider tiles spill.
AMPERE = DEFAULTS | {
    64: Tile(64, 128, 64, 8, 3, "before"),
    128: Tile(128, 128, 64, 8, 3, "before"),
    256: Tile(128, 128, 64, 8, 3, "before"),
    MAX_KERNEL_ROWS: Tile(128, 128, 64, 8, 3, "before"),
}
# float32: products on the CUDA cores, whose operands fill registers.
EXACT = Tile(16, 64, 32, 4, 2, "before")


# No tile: cuBLAS. A tuned tile of a smaller bucket may say so, too.
CUBLAS = Tile(0, 0, 0, 0, 0, "before")


# What tuning tries: by the most rows, block_m, block_n, block_k, warps, stages, scale.
CANDIDATES: dict[int, tuple[tuple[int, int, int, int, int, Scale], ...]] = {
    16: (
        (16, 64, 128, 4, 4, "after"),
        (16, 64, 128, 4, 6, "after"),
        (16, 128, 128, 4, 3, "after"),
        (16, 128, 128, 4, 4, "after"),
        (16, 128, 128, 8, 4, "after"),
        (16, 256, 128, 8, 3, "after"),
        (16, 256, 128, 8, 4, "after"),
    ),
    32: (
        (32, 64, 128, 4, 4, "after"),
        (32, 128, 128, 4, 3, "after"),
        (32, 128, 128, 4, 4, "after"),
        (32, 128, 128, 8, 4, "after"),
        (32, 256, 128, 8, 3, "after"),
        (32, 256, 128, 8, 4, "after"),
    ),
    64: (
        (64, 64, 128, 4, 3, "after"),
        (64, 128, 128, 8, 3, "after"),
        (64, 128, 128, 4, 3, "before"),
        (64, 128, 64, 4, 4, "before"),
        (64, 256, 64, 8, 4, "before"),
        (64, 256, 128, 8, 3, "before"),
    ),
    128: (
        (64, 128, 64, 4, 4, "before"),
        (64, 256, 64, 8, 4, "before"),
        (128, 128, 64, 4, 4, "before"),
        (128, 256, 64, 8, 3, "before"),
        (128, 256, 64, 8, 4, "before"),
    ),
    MAX_KERNEL_ROWS: (
        (128, 128, 64, 4, 4, "before"),
        (128, 256, 64, 8, 3, "before"),
        (128, 256, 64, 8, 4, "before"),
    ),
}


def bucket_of(rows: int) -> int:
    """MAX_KERNEL_ROWS at most."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), MAX_KERNEL_ROWS)


def choose_tile(
    kernel: str, n: int, k: int, group_size: int, dtype: torch.dtype, rows: int, chip: Chip
) -> Tile:
    """The tile of "w4a16" or "w4a16_gated", with its number of splits, or CUBLAS."""
    if rows > MAX_KERNEL_ROWS:
        return CUBLAS
    tuned, bucket = None, bucket_of(rows)
    if dtype != torch.float32:
        tuned = tiles.lookup(kernel, n=n, k=k, group=group_size, m=bucket)
    if tuned is None:
        return default_tile(kernel, n, k, group_size, dtype, bucket, chip)
    return fit(Tile(**tuned), kernel, n, k, group_size, bucket, chip)


def default_tile(
    kernel: str, n: int, k: int, group_size: int, dtype: torch.dtype, bucket: int, chip: Chip
) -> Tile:
    by_rows = DEFAULTS if chip.has_wide_products else AMPERE
    tile = EXACT if dtype == torch.float32 else by_rows[bucket]
    return fit(tile, kernel, n, k, group_size, bucket, chip)


@cache
def fit(tile: Tile, kernel: str, n: int, k: int, group_size: int, bucket: int, chip: Chip) -> Tile:
    """The tile, cut where this product asks for it, with a number of splits."""
    if tile.block_m == 0:
        return CUBLAS
    gated = kernel == "w4a16_gated"
    # Several groups in a step are told apart where the weights are, not in their product.
    block_k = choose_block_k(tile.block_k, k, group_size)
    several = group_size < block_k
    if several and not chip.has_wide_products:
        block_k = min(block_k, 64)  # 128 spill
    tile = replace(
        tile,
        # A gated program's rows are two halves of whole tiles.
        block_n=max(tile.block_n, 128) if gated or several else tile.block_n,
        block_k=block_k,
        scale="before" if several else tile.scale,
    )
    steps = -(-k // tile.block_k)
    programs = -(-bucket // tile.block_m) * -(-n // tile.block_n)
    # Bytes per output: a part's sums are 4 a row, written and read in L2, which gives two while
    # memory gives one; a step's weights are half a byte per input.
    part = 8 * min(bucket, tile.block_m) / tile.block_k
    splits = tile.splits or num_splits(programs, steps, part, chip)
    # The same number of steps for every part, and no part without any.
    steps_per_split = -(-steps // min(splits, MAX_SPLITS, steps))
    return replace(tile, splits=1 if gated else -(-steps // steps_per_split))


def num_splits(programs: int, steps: int, part: float, chip: Chip) -> int:
    """The number with which the busiest SM has least to do, between about PROGRAMS_PER_SM an SM and
    twice as many: a program has its share of `steps`, and writing its sums is `part` of a step.

    Counted, not timed: 48 tiles of 32 steps (6144 x 4096) are 11.6 steps for each of 132 SMs; the
    busiest has 18 with 6 parts, which are 2.2 programs an SM, and 12 with 8.
    """
    about = PROGRAMS_PER_SM * chip.num_sms // programs
    least, most = (min(max(1, number), MAX_SPLITS) for number in (about, 2 * about))

    def busiest(splits: int) -> float:
        return -(-programs * splits // chip.num_sms) * (-(-steps // splits) + part)

    return min(range(least, most + 1), key=busiest)


def choose_block_k(wanted: int, k: int, group_size: int) -> int:
    """At most `wanted` inputs, of one group or of whole ones; steps without rest where possible."""
    for size in (128, 64, 32):
        whole_groups = group_size % size == 0 or size % group_size == 0
        if size <= wanted and k % size == 0 and (whole_groups or group_size == k):
            return size
    return 32


def group_constants(k: int, group_size: int, block_k: int) -> dict[str, int]:
    """Of the kernels that read scales."""
    if group_size == k:
        return {"GROUP": 0, "GROUPS": 1}
    return {"GROUP": group_size, "GROUPS": max(1, block_k // group_size)}


def candidates(kernel: str, *, n: int, k: int, group: int, m: int) -> list[dict[str, Any]]:
    """Tiles worth a try for a bucket of rows, with splits for one and four programs an SM, and for
    the two or more of `num_splits`.
    """
    shapes = CANDIDATES[next(most for most in CANDIDATES if m <= most)]
    found: dict[Tile, None] = {}
    for shape, programs in product(shapes, (1, None, 4)):
        tile = Tile(*shape)
        if programs is not None:
            wanted = programs * HOPPER.num_sms // (-(-m // shape[0]) * -(-n // shape[1]))
            tile = replace(tile, splits=max(1, wanted))
        found[fit(tile, kernel, n, k, group, m, HOPPER)] = None
    if m > 32:
        found[CUBLAS] = None
    return [asdict(tile) for tile in found]
