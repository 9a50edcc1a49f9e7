"""Device functions that turn the words of a QuantizedKV (kernels/kv_layout.py) into operands.

A word's bytes become centred integers c = u - CENTRE (8-bit 128, 4-bit 8; fp8 its value), exact in
float16, in the order of a matrix unit's fragment: nothing passes through shared memory. With the
centred zero z = zero + CENTRE * scale, which is small where values are balanced around 0,

    q . k = k_scale * (q . c) + k_z * sum(q)          p . v = (p * v_scale) . c + sum(p * v_z)

so that scales and zeros multiply scores and probabilities, never keys or values.

4-bit features come in the order of `feature_order`: their order does not matter to a sum over
features, and that of an output's columns is free. With `EXACT` (float32 activations) operands are
float32, else float16.
"""

import triton
import triton.language as tl

from kernels.gpu.flags import INTERPRET

OUTSIDE = tl.constexpr(1 << 20)  # a padding column's feature: no head has so many


@triton.jit
def centred_params(words, POLICY: tl.constexpr):
    """Words of `params` -> scale and centred zero, float32; policy 16 has no use for its zero."""
    scale = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if POLICY == 8:
        zero += scale * 128.0
    if POLICY == 4:
        zero += scale * 8.0
    return scale, zero


@triton.jit
def feature_order(WIDTH: tl.constexpr, F: tl.constexpr, POLICY: tl.constexpr):
    """The feature in each of WIDTH columns of an unpacked tile; >= OUTSIDE: padding.

    WIDTH is the power of two >= F, twice that for 4 bits. Whoever knows D masks features >= D.
    """
    columns = tl.arange(0, WIDTH)
    if POLICY == 4:  # runs of 8 bytes: their 8 low nibbles, then their 8 high ones
        columns_f = columns // 16 * 8 + columns % 8
        features = columns_f + columns // 8 % 2 * F
    else:
        columns_f = columns
        features = columns
    return tl.where(columns_f < F, features, OUTSIDE)


@triton.jit
def unpack_k(words, POLICY: tl.constexpr, EXACT: tl.constexpr):
    """[TOKENS, W] words of keys -> [TOKENS, 4 W], for 4 bits [TOKENS, 8 W]."""
    T: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if POLICY == 4:
        # [token, run, lane, half, pair, nibble] -> [token, run, half, nibble, lane, pair]
        x = tl.reshape(_nibbles(words, EXACT), (T, W // 4, 4, 2, 2, 2))
        tile = tl.reshape(tl.permute(x, (0, 1, 3, 5, 2, 4)), (T, 8 * W))
    else:
        # [token, run, lane, half, pair] -> [token, run, half, lane, pair]
        x = tl.reshape(_bytes(words, POLICY, EXACT), (T, W // 4, 4, 2, 2))
        tile = tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (T, 4 * W))
    return tile


@triton.jit
def unpack_vt(words, POLICY: tl.constexpr, EXACT: tl.constexpr):
    """[TOKENS / 4, F] words of values -> [F, TOKENS], for 4 bits [2 F, TOKENS]."""
    R: tl.constexpr = words.shape[0]
    F: tl.constexpr = words.shape[1]
    if POLICY == 4:
        # [run, lane, f / 8, f % 8, half, pair, nibble]
        # -> [f / 8, nibble, f % 8, run, half, lane, pair]
        x = tl.reshape(_nibbles(words, EXACT), (R // 4, 4, F // 8, 8, 2, 2, 2))
        tile = tl.reshape(tl.permute(x, (2, 6, 3, 0, 4, 1, 5)), (2 * F, 4 * R))
    else:
        # [run, lane, f, half, pair] -> [f, run, half, lane, pair]
        x = tl.reshape(_bytes(words, POLICY, EXACT), (R // 4, 4, F, 2, 2))
        tile = tl.reshape(tl.permute(x, (2, 0, 3, 1, 4)), (F, 4 * R))
    return tile


@triton.jit
def _bytes(words, POLICY: tl.constexpr, EXACT: tl.constexpr):
    """[..., 2, 2]: the values of each word's bytes, [half, pair]."""
    if POLICY == 8:
        b0, b1, b2, b3 = _int8_values(words)
    else:
        b0, b1, b2, b3 = _fp8_values(words)
    values = tl.join(tl.join(b0, b2), tl.join(b1, b3))  # join adds a last axis
    return values.to(tl.float32 if EXACT else tl.float16)


@triton.jit
def _nibbles(words, EXACT: tl.constexpr):
    """[..., 2, 2, 2]: the values of each word's nibbles, [half, pair, nibble]."""
    a0, a1, a2, a3, b0, b1, b2, b3 = _int4_values(words)
    low = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    high = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    values = tl.join(low, high)
    return values.to(tl.float32 if EXACT else tl.float16)


@triton.jit
def _int8_values(words):
    if INTERPRET:
        b0 = (words & 255).to(tl.float32) - 128.0
        b1 = ((words >> 8) & 255).to(tl.float32) - 128.0
        b2 = ((words >> 16) & 255).to(tl.float32) - 128.0
        b3 = ((words >> 24) & 255).to(tl.float32) - 128.0
    else:
        # 0x6400 is float16 1024, whose mantissa step is 1; 0x6480 is 1152.
        b0, b1, b2, b3 = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, bias;
            mov.b32 bias, 0x64806480;
            prmt.b32 a, $4, 0x64646464, 0x4140;
            prmt.b32 b, $4, 0x64646464, 0x4342;
            sub.rn.f16x2 a, a, bias;
            sub.rn.f16x2 b, b, bias;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            }""",
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16,) * 4,
            is_pure=True,
            pack=1,
        )
    return b0, b1, b2, b3


@triton.jit
def _int4_values(words):
    """The low nibbles of the four bytes, then the high ones."""
    if INTERPRET:
        a0 = (words & 15).to(tl.float32) - 8.0
        a1 = ((words >> 8) & 15).to(tl.float32) - 8.0
        a2 = ((words >> 16) & 15).to(tl.float32) - 8.0
        a3 = ((words >> 24) & 15).to(tl.float32) - 8.0
        b0 = ((words >> 4) & 15).to(tl.float32) - 8.0
        b1 = ((words >> 12) & 15).to(tl.float32) - 8.0
        b2 = ((words >> 20) & 15).to(tl.float32) - 8.0
        b3 = ((words >> 28) & 15).to(tl.float32) - 8.0
    else:
        # low: 1024 + u, less 0x6408 = 1032. high: 1024 + 16 u, times 0x2c00 = 1/16, plus
        # 0xd480 = -72. All exact in float16.
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, la, lb, ha, hb, bias, sixteenth, shift;
            mov.b32 bias, 0x64086408;
            mov.b32 sixteenth, 0x2c002c00;
            mov.b32 shift, 0xd480d480;
            prmt.b32 a, $8, 0, 0x1100;
            prmt.b32 b, $8, 0, 0x3322;
            lop3.b32 la, a, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 lb, b, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 ha, a, 0x00f000f0, 0x64006400, 0xea;
            lop3.b32 hb, b, 0x00f000f0, 0x64006400, 0xea;
            sub.rn.f16x2 la, la, bias;
            sub.rn.f16x2 lb, lb, bias;
            fma.rn.f16x2 ha, ha, sixteenth, shift;
            fma.rn.f16x2 hb, hb, sixteenth, shift;
            mov.b32 {$0, $1}, la;
            mov.b32 {$2, $3}, lb;
            mov.b32 {$4, $5}, ha;
            mov.b32 {$6, $7}, hb;
            }""",
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=1,
        )
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def _fp8_values(words):
    if INTERPRET:
        b0 = _e4m3(words & 255)
        b1 = _e4m3((words >> 8) & 255)
        b2 = _e4m3((words >> 16) & 255)
        b3 = _e4m3((words >> 24) & 255)
    else:
        b0, b1, b2, b3 = tl.inline_asm_elementwise(  # sm_89 and later
            """{
            .reg .b16 low, high;
            .reg .b32 a, b;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 a, low;
            cvt.rn.f16x2.e4m3x2 b, high;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            }""",
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16,) * 4,
            is_pure=True,
            pack=1,
        )
    return b0, b1, b2, b3


@triton.jit
def _e4m3(bits):
    exponent = (bits >> 3) & 15
    mantissa = (bits & 7).to(tl.float32)
    subnormal = mantissa * 0.001953125  # 2^-9
    normal = (mantissa + 8.0) * tl.exp2(exponent.to(tl.float32) - 10.0)
    value = tl.where(exponent == 0, subnormal, normal)
    return tl.where(bits >= 128, -value, value)
