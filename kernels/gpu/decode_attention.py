"""Attention of one query per sequence over its keys in the paged cache (flash decoding).

A program has one split of one sequence's keys and one KV head; the G query heads that share the
head are the rows of its matrix products, padded to 16. It goes through its keys in tiles of whole
tokens that never cross a block, with a running maximum. With more than one split the parts are
merged by a second kernel (decode_attention_parts.py). Rows whose context_len is 0 get zeros.

The number of splits depends on host integers only, so that a CUDA graph serves every length that
its bucket allows; splits without keys return at once.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gpu import interpreted
from kernels.gpu.compile import CompileCase
from kernels.gpu.decode_attention_parts import merge_splits_kernel
from kernels.gpu.decode_attention_plain import decode_plain_kernel
from kernels.gpu.decode_attention_quantized import decode_quantized_kernel
from kernels.gpu.decode_attention_tiles import (
    Form,
    Tile,
    candidates,
    default_tile,
    form_of,
    num_splits,
    tile_for,
)
from kernels.gpu.dependent_launch import dependent_launch, launch_options
from kernels.gpu.step import GpuStep
from kernels.kv_layout import LayerCache, QuantizedKV, features_per_token

__all__ = ["candidates", "compile_cases", "decode_attention", "tile_case"]

_INTERPRETED_SMS = 4


def decode_attention(
    q: Tensor,
    cache: LayerCache,
    step: GpuStep,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Rows 0:num_decodes of q [T, Hq, D] into those of out [T, Hq, D].

    The queries' own keys are stored already. `soft_cap`: scores become cap * tanh(score / cap).
    `alibi_slopes` float32 [Hq]: score += slope * (key position - query position).
    """
    if step.num_decodes == 0:
        return
    assert q.shape == out.shape
    assert q.stride(2) == 1
    assert out.is_contiguous()
    assert step.block_tables.stride(1) == 1
    form = _form(q, cache)
    assert form.block_size == step.block_size
    tile = tile_for(form)
    num_heads, head_dim = q.shape[1:]
    row_tiles = -(-form.group // tile.rows)
    programs = step.num_decodes * form.num_kv_heads * row_tiles
    max_keys = step.max_context_len
    if window is not None:
        max_keys = min(max_keys, window + tile.tokens)
    splits = num_splits(programs, max_keys, _num_sms(q.device), tile)
    part_out, part_stat = None, None
    if splits > 1:
        parts = (step.num_decodes, num_heads, splits)
        part_out = q.new_empty((*parts, head_dim), dtype=torch.float32)
        part_stat = q.new_empty((*parts, 2), dtype=torch.float32)
    kernel, constants = _specialise(form, tile)
    pdl = dependent_launch(q.device)
    options = {"PDL": pdl, **launch_options(pdl)}
    kernel[(step.num_decodes, form.num_kv_heads * row_tiles, splits)](
        q, *_tensors(cache), step.block_tables, step.rows, step.context_lens, alibi_slopes,
        out, part_out, part_stat, scale * math.log2(math.e), soft_cap, window,
        q.stride(0), q.stride(1), step.block_tables.stride(0), **constants, **options,
    )  # fmt: skip
    if splits > 1:
        merge_splits_kernel[(step.num_decodes * num_heads,)](
            part_out, part_stat, step.context_lens, out, window, splits,
            **_merge_constants(form, tile, splits), **options,
        )  # fmt: skip


def _form(q: Tensor, cache: LayerCache) -> Form:
    _, num_heads, head_dim = q.shape
    if isinstance(cache, QuantizedKV):
        assert cache.head_dim == head_dim
        assert head_dim % 16 == 0
        heads, block_size, policy = cache.num_kv_heads, cache.block_size, cache.policy
    else:
        assert cache.shape[3] == head_dim
        assert cache.dtype == q.dtype
        heads, block_size, policy = cache.shape[1] // 2, cache.shape[2], 0
    assert num_heads % heads == 0
    assert all(tensor.is_contiguous() for tensor in _tensors(cache))
    return Form(heads, num_heads // heads, head_dim, block_size, policy, q.dtype)


def _tensors(cache: LayerCache) -> tuple[Tensor, ...]:
    return (cache.k, cache.v, cache.params) if isinstance(cache, QuantizedKV) else (cache,)


def _specialise(form: Form, tile: Tile) -> tuple[Any, dict[str, Any]]:
    """The kernel, its constants and its launch options."""
    assert form.block_size % tile.tokens == 0
    assert tile.tokens % 16 == 0, "matrix units take 16 keys at a time"
    constants: dict[str, Any] = {
        "HEADS": form.num_kv_heads,
        "G": form.group,
        "D": form.head_dim,
        "BLOCK_SIZE": form.block_size,
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "EXACT": _exact(form),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if form.policy == 0:
        return decode_plain_kernel, constants | {"WIDTH": form.width}
    return decode_quantized_kernel, constants | {
        "F": features_per_token(form.head_dim, form.policy),
        "F_WIDTH": form.width,
        "POLICY": form.policy,
    }


def _exact(form: Form) -> bool:
    """Whether products are of float32 numbers; the interpreter cannot multiply bf16 ones."""
    plain_bf16 = form.policy == 0 and form.dtype == torch.bfloat16
    return form.dtype == torch.float32 or (plain_bf16 and interpreted())


def _merge_constants(form: Form, tile: Tile, splits: int) -> dict[str, Any]:
    width = int(triton.next_power_of_2(form.head_dim))
    width_splits = int(triton.next_power_of_2(splits))
    return {
        "QUERY_HEADS": form.num_kv_heads * form.group,
        "D": form.head_dim,
        "WIDTH": width,
        "TOKENS": tile.tokens,
        "WIDTH_SPLITS": width_splits,
        "num_warps": min(8, max(1, width_splits * width // 1024)),
    }


@cache
def _num_sms(device: torch.device) -> int:
    if interpreted():
        return _INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_cases() -> list[CompileCase]:
    """Every kind of cache at D = 128, then what differs: head sizes, masks, splits, groups."""
    return [*_forms(), *_merges()]


def tile_case(kernel: str, key: dict[str, Any], tile: dict[str, Any]) -> CompileCase:
    """Of a tuned tile."""
    assert kernel == "decode_attention"
    return _case(form_of(key), Tile(**tile), label="tuned ")


def _forms() -> Iterator[CompileCase]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for policy in (0, 8, 4, 16):
        yield _case(Form(8, 4, 128, 64, policy, bf16))
        yield _case(Form(8, 4, 128, 64, policy, bf16), split=True)
    for policy in (0, 8, 4):
        yield _case(Form(8, 4, 128, 64, policy, bf16), masks=True)
    sizes = ((0, 64), (8, 64), (4, 64), (0, 80), (4, 80), (8, 96), (16, 96), (0, 256), (4, 256))
    for policy, head_dim in sizes:
        yield _case(Form(8, 4, head_dim, 64, policy, bf16))
    yield _case(Form(8, 4, 256, 64, 8, bf16), split=True)
    yield _case(Form(8, 4, 128, 64, 8, bf16), split=True, pdl=True)
    yield _case(Form(8, 4, 128, 64, 0, fp16))
    yield _case(Form(8, 4, 128, 64, 0, fp32))
    yield _case(Form(8, 4, 128, 64, 8, fp32))
    yield _case(Form(1, 71, 64, 16, 0, bf16))
    yield _case(Form(2, 24, 128, 64, 8, bf16))


def _merges() -> Iterator[CompileCase]:
    for splits, head_dim in ((2, 128), (64, 256)):
        form = Form(8, 4, head_dim, 64, 0, torch.bfloat16)
        constants = _merge_constants(form, default_tile(form), splits) | {"PDL": False}
        options = {"num_warps": constants.pop("num_warps")}
        yield CompileCase(
            f"merge D{head_dim} splits {splits}",
            merge_splits_kernel,
            (torch.float32, torch.float32, torch.int32, torch.bfloat16, None, splits),
            constants,
            options,
        )


def _case(
    form: Form,
    tile: Tile | None = None,
    *,
    split: bool = False,
    masks: bool = False,
    pdl: bool = False,
    label: str = "",
) -> CompileCase:
    tile = tile or default_tile(form)
    kernel, constants = _specialise(form, tile)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    name = str(form.dtype).removeprefix("torch.")
    label += f"{name} {form.kv} D{form.head_dim} G{form.group} block {form.block_size}"
    label += f" tile {tile.tokens}x{tile.rows} w{tile.num_warps} s{tile.num_stages}"
    cache = (torch.int32,) * 3 if form.policy else (form.dtype,)
    part = torch.float32 if split else None
    stride = form.num_kv_heads * form.group * form.head_dim
    return CompileCase(
        label + " split" * split + " window cap alibi" * masks + " pdl" * pdl,
        kernel,
        (
            form.dtype, *cache, torch.int32, torch.int32, torch.int32,
            torch.float32 if masks else None, form.dtype, part, part, 0.125,
            50.0 if masks else None, 4096 if masks else None, stride, form.head_dim, 1024,
        ),
        constants | {"PDL": pdl},
        options | launch_options(pdl),
        elements=2 * tile.tokens * form.head_dim,
        min_capability=90 if pdl else 89 if form.policy == 16 else 80,
    )  # fmt: skip
