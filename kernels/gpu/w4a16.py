"""Launchers of the W4A16 product (kernels/gpu/w4a16_kernel.py), its forms and its tuned tiles."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu.chip import HOPPER, Chip, chip_of
from kernels.gpu.compile import CompileCase
from kernels.gpu.dependent_launch import dependent_launch, launch_options
from kernels.gpu.w4a16_dequantise import dequantise, dequantise_case
from kernels.gpu.w4a16_kernel import w4a16_kernel
from kernels.gpu.w4a16_pack import TILE, W4A16Weight
from kernels.gpu.w4a16_tiles import (
    CUBLAS,
    Tile,
    bucket_of,
    candidates,
    choose_tile,
    default_tile,
    group_constants,
)
from kernels.partials import Partials

__all__ = [
    "candidates",
    "compile_cases",
    "is_gated_best",
    "tile_case",
    "w4a16_linear",
    "w4a16_silu_mul",
]

# Brought to L2 while the kernel before still runs: 16 KiB a program, two steps of its weights.
PREFETCH_LINES = 128


def w4a16_linear(
    x: Tensor, weight: W4A16Weight, bias: Tensor | None, partial: bool = False
) -> Tensor | Partials:
    """x [M, K] -> [M, N]. `partial`: Partials will do as well."""
    m, n = len(x), weight.shape[0]
    tile = _tile("w4a16", x, weight)
    if tile == CUBLAS:
        return F.linear(x, dequantise(weight), bias)
    assert tile.splits is not None
    if tile.splits == 1:
        out = x.new_empty(m, n)
        _launch(x, weight, bias, out, tile, gated=False)
        return out
    parts = x.new_empty(tile.splits, m, n, dtype=torch.float32)
    _launch(x, weight, None, parts, tile, gated=False)
    summed = Partials(parts, bias, x.dtype)
    return summed if partial else summed.sum()


def is_gated_best(x: Tensor, weight: W4A16Weight) -> bool:
    """Whether the gated form can compute the product, and fills the GPU without cutting K."""
    tile, n = _tile("w4a16_gated", x, weight), weight.shape[0]
    if tile == CUBLAS:
        return False
    programs = -(-bucket_of(len(x)) // tile.block_m) * -(-n // tile.block_n)
    return bool(n % (2 * TILE) == 0 and 4 * programs >= 3 * chip_of(x.device).num_sms)


def w4a16_silu_mul(x: Tensor, weight: W4A16Weight, bias: Tensor | None) -> Tensor:
    """x [M, K], outputs of `weight` gate's and then up's -> silu(gate) * up, [M, N/2]."""
    out = x.new_empty(len(x), weight.shape[0] // 2)
    _launch(x, weight, bias, out, _tile("w4a16_gated", x, weight), gated=True)
    return out


def _tile(kernel: str, x: Tensor, weight: W4A16Weight) -> Tile:
    chip = chip_of(x.device)
    return choose_tile(kernel, *weight.shape, weight.group_size, x.dtype, len(x), chip)


def _launch(
    x: Tensor, weight: W4A16Weight, bias: Tensor | None, out: Tensor, tile: Tile, gated: bool
) -> None:
    (m, k), n = x.shape, weight.shape[0]
    assert k == weight.shape[1]
    assert x.is_contiguous()
    assert x.dtype == weight.scales.dtype
    assert out.is_contiguous()
    splits, pdl = tile.splits or 1, dependent_launch(x.device)
    # Not triton.cdiv: on the host each call costs as much as a torch.empty, and an eager step of
    # 32 layers made 500 of them here.
    steps = -(-k // tile.block_k)
    grid = (-(-m // tile.block_m), -(-n // tile.block_n), splits)
    w4a16_kernel[grid](
        x, weight.words, weight.scales, weight.zeros, bias, out, m, n, k,
        -(-steps // splits),
        **_constants(tile, k, weight.group_size, gated, pdl), **_options(tile, pdl),
    )  # fmt: skip


def _constants(tile: Tile, k: int, group_size: int, gated: bool, pdl: bool) -> dict[str, Any]:
    return {
        **group_constants(k, group_size, tile.block_k),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SCALE_AFTER": tile.scale == "after",
        "EVEN_K": k % tile.block_k == 0,
        "GATED": gated,
        "PREFETCH": PREFETCH_LINES if pdl else 0,
        "PDL": pdl,
    }


def _options(tile: Tile, pdl: bool) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | launch_options(pdl)


def compile_cases() -> list[CompileCase]:
    f16, f32, ampere = torch.float16, torch.float32, replace(HOPPER, capability=80)
    return [
        *(_case(bucket) for bucket in (4, 16, 32, 64, 128, 256)),
        *(_case(bucket, chip=ampere) for bucket in (64, 128)),
        *(_case(bucket, group_size=32, chip=ampere) for bucket in (16, 64)),
        *(_case(bucket, gated=True) for bucket in (4, 16, 32, 64)),
        _case(4, zeros=False),
        _case(16, zeros=False),
        _case(16, splits=1, bias=True),
        _case(16, group_size=64),
        *(_case(bucket, group_size=32) for bucket in (4, 16, 64)),
        *(_case(16, group_size=size, gated=True) for size in (32, 4096)),
        _case(16, group_size=4096),
        _case(64, k=4040, group_size=4040),
        _case(16, f16),
        _case(16, f32),
        _case(4, pdl=True),
        _case(16, gated=True, pdl=True),
    ]


def tile_case(kernel: str, key: dict[str, Any], tile: dict[str, Any]) -> CompileCase:
    """Of a tuned tile, for weights with zeros."""
    n, k, group_size = key["n"], key["k"], key["group"]
    if Tile(**tile) == CUBLAS:
        return dequantise_case(torch.bfloat16, n, k, group_size, zeros=True)
    gated = kernel == "w4a16_gated"
    return _compile_case("tuned", Tile(**tile), torch.bfloat16, n, k, group_size, gated)


def _case(
    bucket: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    k: int = 4096,
    group_size: int = 128,
    gated: bool = False,
    zeros: bool = True,
    bias: bool = False,
    splits: int = 4,
    pdl: bool = False,
    chip: Chip = HOPPER,
) -> CompileCase:
    """Of a default tile. `group_size` k: one group."""
    kernel, n = ("w4a16_gated" if gated else "w4a16"), 28672
    tile = default_tile(kernel, n, k, group_size, dtype, bucket, chip)
    tile = replace(tile, splits=1 if gated else splits)
    name = f"M{bucket}" + " sm_80" * (chip.capability < 90)
    return _compile_case(name, tile, dtype, n, k, group_size, gated, zeros, bias, pdl)


def _compile_case(
    name: str,
    tile: Tile,
    dtype: torch.dtype,
    n: int,
    k: int,
    group_size: int,
    gated: bool,
    zeros: bool = True,
    bias: bool = False,
    pdl: bool = False,
) -> CompileCase:
    split = (tile.splits or 1) > 1
    facts = {"zeros": zeros, "gated": gated, "split": split, "bias": bias, "pdl": pdl}
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    ways = f"w{tile.num_warps} s{tile.num_stages} {tile.scale}"
    of = f"{str(dtype).removeprefix('torch.')} K{k} g{group_size}"
    # Wider tiles and steps of several groups spill on what came before, which has its own.
    hopper = tile.block_m > 32 or group_size < tile.block_k
    named = [fact for fact, given in facts.items() if given]
    return CompileCase(
        " ".join([name, shape, ways, of, *named]),
        w4a16_kernel,
        (
            dtype, torch.int32, dtype, torch.uint8 if zeros else None, dtype if bias else None,
            torch.float32 if split else dtype, 16, n, k, 8,
        ),
        _constants(tile, k, group_size, gated, pdl),
        _options(tile, pdl),
        elements=tile.block_n * tile.block_k,
        min_capability=80 if "sm_80" in name or not (hopper or pdl) else 90,
        max_capability=89 if "sm_80" in name else 999,
    )  # fmt: skip
