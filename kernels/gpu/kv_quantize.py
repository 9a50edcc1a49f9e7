"""kernels.kv_layout.quantize_kv and its byte order, for kernels that write a quantised cache.

The bytes are those of the torch twin, in the interpreter bit by bit, where all values are finite.

A NaN shows in the params alone: readers mask those of slots behind a context, but not their bytes,
and one that fp8 takes for NaN would outlive its sequence in a block that is given to another.
"""

import triton
import triton.language as tl

from kernels.gpu.flags import INTERPRET
from kernels.kv_layout import FP8_MAX

_FP8_MAX = tl.constexpr(FP8_MAX)
_LEAST_SCALE = tl.constexpr(2.0**-24)
_TO_INTEGER = tl.constexpr(2.0**23)  # float32 has no fractions from here on


@triton.jit
def _e4m3_bits(y):
    """uint8: float32 y, within the range, as e4m3. The interpreter's own rounding is another."""
    if INTERPRET:
        signed = y.to(tl.int32, bitcast=True)
        bits = signed & 0x7FFFFFFF
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        least = 2.0**-9
        subnormal = ((tl.abs(y) + least * _TO_INTEGER) - least * _TO_INTEGER) / least
        u = tl.where(tl.abs(y) < 2.0**-6, subnormal.to(tl.int32), normal)
        u |= tl.where(signed < 0, 0x80, 0)
        u = u.to(tl.uint8)
    else:
        u = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return u


@triton.jit
def _levels(x, scale, zero, mask, POLICY: tl.constexpr):
    """uint8; 0 outside the mask."""
    y = tl.div_rn(x - zero[:, None], tl.broadcast_to(scale[:, None], x.shape))
    if POLICY == 16:
        u = _e4m3_bits(tl.clamp(tl.where(y == y, y, 0.0), -_FP8_MAX, _FP8_MAX))
    else:
        y = tl.minimum(tl.maximum(y, 0.0), 2.0**POLICY - 1)
        u = ((y + _TO_INTEGER) - _TO_INTEGER).to(tl.int32).to(tl.uint8)  # half to even
    return tl.where(mask, u, 0)


@triton.jit
def quantize(low, high, low_mask, high_mask, POLICY: tl.constexpr):
    """The levels of both tiles and each token's params."""
    broken = tl.sum(low * 0.0 + high * 0.0, 1)  # 0, or the NaN that minima and maxima ignore
    if POLICY == 16:
        largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        zero = tl.zeros_like(largest)
        scale = tl.div_rn(largest, tl.full(largest.shape, _FP8_MAX, tl.float32))
    else:
        least = tl.min(tl.where(low_mask, low, float("inf")), 1)
        least = tl.minimum(least, tl.min(tl.where(high_mask, high, float("inf")), 1))
        zero = (least + broken).to(tl.float16).to(tl.float32)
        largest = tl.max(tl.where(low_mask, low, float("-inf")), 1)
        largest = tl.maximum(largest, tl.max(tl.where(high_mask, high, float("-inf")), 1))
        steps = tl.full(largest.shape, 2.0**POLICY - 1, tl.float32)
        scale = tl.div_rn(largest - zero, steps)
    scale = tl.maximum(scale.to(tl.float16).to(tl.float32), _LEAST_SCALE) + broken
    u_low = _levels(low, scale, zero, low_mask, POLICY)
    u_high = _levels(high, scale, zero, high_mask, POLICY)
    scale_bits = scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    zero_bits = zero.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return u_low, u_high, scale_bits | (zero_bits << 16)


@triton.jit
def _byte(elements):
    """Where in its run's 16 bytes an element lies: 8h + 2l + p at 4l + 2h + p."""
    return elements % 8 // 2 * 4 + elements // 8 % 2 * 2 + elements % 2


@triton.jit
def byte_offsets(rows, features, is_key, F: tl.constexpr):
    """Of features [F] of tokens in rows of [-1, F], whose keys or values these are."""
    if is_key:
        offs = rows[:, None] * F + (features // 16 * 16 + _byte(features))[None, :]
    else:
        words = rows // 16 * 4 + _byte(rows) // 4
        offs = (words[:, None] * F + features[None, :]) * 4 + (_byte(rows) % 4)[:, None]
    return offs
