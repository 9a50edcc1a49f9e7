"""Gumbel noise as a function of (seed, position, token id): no state to keep, restore or upload.

A token drawn from softmax(x) is argmax(x + g) with independent g = -log(-log(u)). Philox4x32-10
has the seed as its key and (token id / 4, position, 0, 0) as its counter; word j of its block is
the u of token 4 i + j. Neither the row nor its batch-mates change a draw.

Winners come from the upper tail of g, where u lies next to 1 and float32 has no resolution left.
So g = -log(-log1p(-u)) of a u next to 0 instead, an odd multiple of 2**-33.
"""

import triton
import triton.language as tl

LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)  # words next to 2**32 round to it: log1p(-1) = -inf
SERIES_BELOW = tl.constexpr(2.0**-10)  # next term u**3 / 3: 3e-7 of u; log(1 - u) loses 6e-8 / u


@triton.jit
def _gumbel_of_words(words):
    uniforms = words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    uniforms = tl.minimum(uniforms, LARGEST_UNIFORM)
    exact = uniforms * (1.0 + 0.5 * uniforms)
    return -tl.log(tl.where(uniforms < SERIES_BELOW, exact, -tl.log(1.0 - uniforms)))


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
