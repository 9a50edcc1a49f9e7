"""What lies between the qkv projection and attention, in one kernel: rope_and_store.

A program has a few tokens of one head, as two tiles of features: `low`, 0 to H, and `high`, H to D,
with H = D / 2 rounded up to a multiple of 16. Those are the two halves of the rotation where all
features turn and D is a multiple of 32 (PAIRED); other programs load each feature's partner as
well. They are also the features whose 4-bit values share a byte (kernels/kv_layout.py), so that
every byte of the cache has one writer.

    x = round(sum of the parts + bias)
    x = round(round(x / sqrt(mean(x^2) + eps)) * weight)          queries and keys, with qk_norm
    x[i] = round(x[i] * cos[i] + x[partner(i)] * sin[i])          queries and keys, i < R

where `round` is to the activations' dtype, as in transformers. Queries go to q [T, Hq, D]; keys and
values to the cache, by the arithmetic of kernels.kv_layout.quantize_kv. Nothing is stored for a
token whose slot is -1, but its query is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.flags import INTERPRET
from kernels.gpu.kv_quantize import byte_offsets, quantize
from kernels.gpu.partials import load_sum
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICIES, LayerCache, QuantizedKV, features_per_token, heads_of
from kernels.partials import Partials
from kernels.rope import RotaryTable

# Above so many tokens a program takes 16 of them: 2048 tokens of 48 heads are 98k programs else.
MAX_LONE_TOKENS = 64
BLOCK_T = 16


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """float32 x as DTYPE holds it. The interpreter would cut bfloat16 off instead of rounding."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(DTYPE).to(tl.float32)
    return x


@triton.jit
def _projected(
    qkv_ptr, bias_ptr, rows, columns, mask, part_stride, SPLITS: tl.constexpr, DTYPE: tl.constexpr
):
    """[tokens, features]."""
    columns = columns[None, :]
    offs = rows[:, None] + columns
    return load_sum(qkv_ptr, offs, columns, mask, part_stride, bias_ptr, SPLITS, DTYPE)


@triton.jit
def _normed(x, inverse, weight_ptrs, mask, DTYPE: tl.constexpr):
    weight = tl.load(weight_ptrs[None, :], mask=mask, other=0.0).to(tl.float32)
    return _rounded(_rounded(x * inverse[:, None], DTYPE) * weight, DTYPE)


@triton.jit
def _partner(features, R: tl.constexpr):
    """The feature that turns with each; one that does not turn is its own."""
    turned = tl.where(features < R // 2, features + R // 2, features - R // 2)
    return tl.where(features < R, turned, features)


@triton.jit
def _angles(table_ptr, positions, features, mask, other, R: tl.constexpr):
    mask = mask & (features < R)[None, :]
    offs = positions[:, None].to(tl.int64) * R + features[None, :]
    return tl.load(table_ptr + offs, mask=mask, other=other).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_store_kernel(
    qkv_ptr,  # [T, (HEADS + 2 * KV_HEADS) * D]; with SPLITS float32 [SPLITS, T, the same]
    bias_ptr,  # [the same], or None
    norm_ptr,  # [HEADS + KV_HEADS, D], or None
    cos_ptr,  # [positions, R]
    sin_ptr,  # the first half negated
    positions_ptr,  # [T]
    slots_ptr,  # [T]
    q_ptr,  # [T, HEADS, D]
    k_ptr,  # bytes; of a plain cache its values [num_blocks, 2 * KV_HEADS, BLOCK_SIZE, D]
    v_ptr,  # bytes, or None
    params_ptr,  # words, or None
    num_tokens,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    TILE: tl.constexpr,  # H rounded up to a power of two
    BLOCK_SIZE: tl.constexpr,
    POLICY: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    PAIRED: tl.constexpr = R == D and D == 2 * H
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    head = tl.program_id(0)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    in_step = tokens < num_tokens
    low = tl.arange(0, TILE)
    high = low + H
    low_mask = in_step[:, None] & ((low < H) & (low < D))[None, :]
    high_mask = in_step[:, None] & ((low < H) & (high < D))[None, :]
    rows = tokens.to(tl.int64) * WIDTH
    part_stride = num_tokens.to(tl.int64) * WIDTH
    first = head * D
    a = _projected(qkv_ptr, bias_ptr, rows, first + low, low_mask, part_stride, SPLITS, DTYPE)
    b = _projected(qkv_ptr, bias_ptr, rows, first + high, high_mask, part_stride, SPLITS, DTYPE)
    if head < HEADS + KV_HEADS:
        positions = tl.load(positions_ptr + tokens, mask=in_step, other=0)
        if norm_ptr is not None:
            mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D
            inverse = tl.rsqrt(mean + eps)
            a = _normed(a, inverse, norm_ptr + first + low, low_mask, DTYPE)
            b = _normed(b, inverse, norm_ptr + first + high, high_mask, DTYPE)
        cos = _angles(cos_ptr, positions, low, low_mask, 1.0, R)
        sin = _angles(sin_ptr, positions, low, low_mask, 0.0, R)
        if PAIRED:
            a, b = a * cos + b * sin, b * cos - a * sin
        else:
            low_by = _partner(low, R)
            high_by = _partner(high, R)
            ya = _projected(
                qkv_ptr, bias_ptr, rows, first + low_by, low_mask, part_stride, SPLITS, DTYPE
            )
            yb = _projected(
                qkv_ptr, bias_ptr, rows, first + high_by, high_mask, part_stride, SPLITS, DTYPE
            )
            if norm_ptr is not None:
                ya = _normed(ya, inverse, norm_ptr + first + low_by, low_mask, DTYPE)
                yb = _normed(yb, inverse, norm_ptr + first + high_by, high_mask, DTYPE)
            a = a * cos + ya * sin
            cos = _angles(cos_ptr, positions, high, high_mask, 1.0, R)
            sin = _angles(sin_ptr, positions, high, high_mask, 0.0, R)
            b = b * cos + yb * sin
        a = _rounded(a, DTYPE)
        b = _rounded(b, DTYPE)
    if head < HEADS:
        q_rows = q_ptr + (tokens.to(tl.int64) * HEADS + head)[:, None] * D
        tl.store(q_rows + low[None, :], a.to(DTYPE), mask=low_mask)
        tl.store(q_rows + high[None, :], b.to(DTYPE), mask=high_mask)
    else:
        slots = tl.load(slots_ptr + tokens, mask=in_step, other=-1)
        stored = slots >= 0
        blocks = slots // BLOCK_SIZE
        offsets = slots % BLOCK_SIZE
        rows = (blocks * (2 * KV_HEADS) + head - HEADS) * BLOCK_SIZE + offsets
        if POLICY == 0:
            to = k_ptr + rows[:, None] * D
            tl.store(to + low[None, :], a.to(DTYPE), mask=low_mask & stored[:, None])
            tl.store(to + high[None, :], b.to(DTYPE), mask=high_mask & stored[:, None])
        else:
            u_low, u_high, params = quantize(a, b, low_mask, high_mask, POLICY)
            tl.store(params_ptr + rows, params, mask=stored)
            is_key = head < HEADS + KV_HEADS
            rows = (blocks * KV_HEADS + (head - HEADS) % KV_HEADS) * BLOCK_SIZE + offsets
            F: tl.constexpr = H if POLICY == 4 else D
            cache_ptr = k_ptr if is_key else v_ptr
            if POLICY == 4:
                u_low |= u_high << 4
            to = cache_ptr + byte_offsets(rows, low, is_key, F)
            tl.store(to, u_low, mask=low_mask & stored[:, None])
            if POLICY != 4:
                to = cache_ptr + byte_offsets(rows, high, is_key, F)
                tl.store(to, u_high, mask=high_mask & stored[:, None])


def rope_and_store(
    qkv: Tensor | Partials,
    qk_norm: Tensor | None,
    eps: float,
    table: RotaryTable,
    positions: Tensor,
    cache: LayerCache,
    step: GpuStep,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    """kernels.rope.rope_and_store. Positions of padding must be within the table, too."""
    data, bias = (qkv.data, qkv.bias) if isinstance(qkv, Partials) else (qkv, None)
    splits = len(data) if isinstance(qkv, Partials) else 0
    num_tokens = step.num_tokens
    width = (num_heads + 2 * num_kv_heads) * head_dim
    assert data.shape[-2:] == (num_tokens, width)
    assert data.is_contiguous()
    assert bias is None or bias.shape == (width,)
    assert qk_norm is None or qk_norm.shape == (num_heads + num_kv_heads, head_dim)
    assert len(positions) == len(step.slot_mapping) == num_tokens
    assert heads_of(cache) == (num_kv_heads, head_dim)
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=data.device)
    tokens = 1 if num_tokens <= MAX_LONE_TOKENS else BLOCK_T
    grid = num_heads + 2 * num_kv_heads, triton.cdiv(num_tokens, tokens)
    _rope_store_kernel[grid](
        data,
        bias,
        qk_norm,
        table.cos,
        table.sin,
        positions,
        step.slot_mapping,
        q,
        *_pointers(cache),
        num_tokens,
        eps,
        **_constants(
            (num_heads, num_kv_heads, head_dim),
            table.cos.shape[1],
            step.block_size,
            cache.policy if isinstance(cache, QuantizedKV) else 0,
            splits,
            tokens,
        ),
        num_warps=1 if tokens == 1 else 4,
    )
    return q


def _pointers(cache: LayerCache) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(cache, QuantizedKV):
        return cache.k.view(torch.uint8), cache.v.view(torch.uint8), cache.params
    return cache, None, None


def _constants(
    heads: tuple[int, int, int], rotary: int, block_size: int, policy: int, splits: int, tokens: int
) -> dict[str, int]:
    num_heads, num_kv_heads, head_dim = heads
    half = features_per_token(head_dim, 4)
    return {
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "D": head_dim,
        "R": rotary,
        "H": half,
        "TILE": triton.next_power_of_2(half),
        "BLOCK_SIZE": block_size,
        "POLICY": policy,
        "SPLITS": splits,
        "TOKENS": tokens,
    }


def compile_cases() -> list[CompileCase]:
    """Llama-3-8B's heads, the parts of a decode step (s) or a prefill's rows; then other forms."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [_case(bf16, 128, policy, splits) for policy in POLICIES for splits in (4, 0)]
    cases += [_case(bf16, head_dim, 4, 0) for head_dim in (64, 80, 96, 256)]
    cases += [_case(bf16, 80, 8, 2, rotary_dim=32), _case(bf16, 80, 0, 0, rotary_dim=32)]
    cases += [_case(bf16, 128, 8, splits, norm=True) for splits in (4, 0)]
    cases += [_case(fp16, 128, 8, 4), _case(fp16, 64, 0, 0), _case(fp32, 128, 8, 0)]
    return [*cases, _case(fp32, 128, 0, 3)]


def _case(
    dtype: torch.dtype,
    head_dim: int,
    policy: int,
    splits: int,
    rotary_dim: int | None = None,
    norm: bool = False,
) -> CompileCase:
    """With `splits` one token to a program, and a bias, else 16 tokens."""
    rotary_dim = rotary_dim or head_dim
    tokens = 1 if splits else BLOCK_T
    label = f"{str(dtype)[6:]} d{head_dim} r{rotary_dim} policy {policy} s{splits} t{tokens}"
    cache = (torch.uint8, torch.uint8, torch.int32) if policy else (dtype, None, None)
    return CompileCase(
        label=label + (" norm" if norm else ""),
        kernel=_rope_store_kernel,
        arguments=(
            torch.float32 if splits else dtype,
            dtype if splits else None,
            dtype if norm else None,
            *(dtype, dtype, torch.int32, torch.int64, dtype),
            *cache,
            *(1000, 1e-5),
        ),
        constants=_constants((32, 8, head_dim), rotary_dim, 64, policy, splits, tokens),
        options={"num_warps": 1 if tokens == 1 else 4},
        min_capability=89 if policy == 16 else 80,
    )
