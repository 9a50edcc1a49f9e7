"""Gumbel noise as a function of (seed, position, token id): no state to keep, restore or upload.

A token drawn from softmax(x) is argmax(x + g) with independent g = -log(-log(u)). Philox4x32-10
has the seed as its key and (token id / 4, position, 0, 0) as its counter; word j of its block is
the u of token 4 i + j. Neither the row nor its batch-mates change a draw.

Winners come from the upper tail of g, where u lies next to 1 and float32 has no resolution left.
So g = -log(-log1p(-u)) of a u next to 0 instead, an odd multiple of 2**-33. The logarithms are the
chip's approximate ones, one instruction each where exact ones take twenty.
"""

import triton
import triton.language as tl

from kernels.gpu.flags import INTERPRET

LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)  # words next to 2**32 round to it: log1p(-1) = -inf
# -log(1 - u) as u + u**2 / 2 + u**3 / 3 is off by u**3 / 4 of itself, the chip's by 2**-22 / u:
# 8e-6 both here.
SERIES_BELOW = tl.constexpr(2.0**-5)


@triton.jit
def _log(x):
    if INTERPRET:
        return tl.log(x)
    log2 = tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    return log2 * 0.6931471805599453


@triton.jit
def _gumbel_of_words(words):
    uniforms = words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    uniforms = tl.minimum(uniforms, LARGEST_UNIFORM)
    series = uniforms * (1.0 + uniforms * (0.5 + uniforms * 0.3333333333333333))
    return -_log(tl.where(uniforms < SERIES_BELOW, series, -_log(1.0 - uniforms)))


@triton.jit
def gumbel_of_block(seed, position, first_token, BLOCK: tl.constexpr):
    """Noise of BLOCK tokens from first_token, a multiple of 4, on: four per block of the cipher."""
    counters = (first_token // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zeros = counters * 0
    w0, w1, w2, w3 = tl.philox(seed, counters, zeros + position.to(tl.uint32), zeros, zeros)
    # join appends an axis: [i, a, b] of join(join(w0, w2), join(w1, w3)) is word 2 a + b
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return _gumbel_of_words(tl.reshape(words, (BLOCK,)))


@triton.jit
def gumbel_of_tokens(seed, position, token_ids):
    """Noise of any tokens."""
    counters = (token_ids // 4).to(tl.uint32)
    zeros = counters * 0
    w0, w1, w2, w3 = tl.philox(seed, counters, zeros + position.to(tl.uint32), zeros, zeros)
    place = token_ids % 4
    words = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
    return _gumbel_of_words(words)
