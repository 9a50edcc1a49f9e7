"""Top-k, top-p and min-p without a sort: cuts found by bisection on the bits of the logits.

Floats in the order of their bits are integers ("units"): a cut is the greatest unit at which the
tokens at or above it number k, or hold p of the weight. Each pass over a row's tokens tries three
pivots and leaves a quarter of the interval: 14 passes for float32, 8 for bfloat16, whose lower 16
bits are always zero. What lies above the cut stays; of the tokens equal to it, those with the
lowest ids that are still needed. The cut is exact, and sums are taken in a fixed order.

Equal means equal logits. (The CPU sampler compares weights; two logits of equal weight differ by a
rounding of exp.)
"""

import triton
import triton.language as tl

from kernels.gpu.gumbel import gumbel_of_tokens
from kernels.gpu.sampling_table import (
    MIN_P_WORD,
    NUM_OUTPUTS_WORD,
    SCALE_WORD,
    SEED_WORD,
    TOP_K_WORD,
    TOP_P_WORD,
    load_float,
    load_word64,
)


@triton.jit
def is_limited(request, VOCAB: tl.constexpr):
    limited = (tl.load(request + TOP_K_WORD) < VOCAB) | (load_float(request + MIN_P_WORD) > 0)
    limited = limited | (load_word64(request + TOP_P_WORD).to(tl.float64, bitcast=True) < 1.0)
    return limited & (load_float(request + SCALE_WORD) > 0)


@triton.jit
def unit_of(x, SHIFT: tl.constexpr):
    """The integer of a float in the order of floats; 2**SHIFT of them are one unit."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(unit, SHIFT: tl.constexpr):
    """The float of a unit: of its 2**SHIFT floats the one with zeros in the lower bits."""
    key = unit << SHIFT
    key = tl.where(key < 0, key | ((1 << SHIFT) - 1), key)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(values_ptr, offs, count):
    return tl.load(values_ptr + offs, mask=offs < count, other=-float("inf")).to(tl.float32)


@triton.jit
def _measure(
    values_ptr, count, p0, p1, p2, maximum, scale, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr
):
    """Number or weight of the tokens at or above each of three pivots, [TILE] tokens at a time.

    The next ones are loaded meanwhile: Triton's own pipelining takes more registers than there are.
    """
    s0 = tl.zeros((TILE,), tl.float32)
    s1 = tl.zeros((TILE,), tl.float32)
    s2 = tl.zeros((TILE,), tl.float32)
    following = load_logits(values_ptr, tl.arange(0, TILE), count)
    for start in range(0, count, TILE):
        x = following
        following = load_logits(values_ptr, start + TILE + tl.arange(0, TILE), count)
        weight = tl.exp((x - maximum) * scale) if BY_WEIGHT else tl.full((TILE,), 1.0, tl.float32)
        s0 += tl.where(x >= p0, weight, 0.0)
        s1 += tl.where(x >= p1, weight, 0.0)
        s2 += tl.where(x >= p2, weight, 0.0)
    return tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0)


@triton.jit
def _find_cut(
    values_ptr,
    count,
    low,
    high,
    target,
    maximum,
    scale,
    BY_WEIGHT: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Greatest unit in [low, high) that leaves `target` (float64), and what lies above it.

    `low` is taken to leave enough; nothing lies at or above `high`.
    """
    above = 0.0
    enough = target.to(tl.float32)
    if enough.to(tl.float64) < target:  # to the next float32, which is greater
        enough = (enough.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    width = (high - low).to(tl.uint32, bitcast=True)
    while width > 1:
        quarter = tl.maximum(width >> 2, 1).to(tl.int32, bitcast=True)
        u0, u1, u2 = low + quarter, low + (width >> 1).to(tl.int32, bitcast=True), high - quarter
        p0, p1, p2 = value_of(u0, SHIFT), value_of(u1, SHIFT), value_of(u2, SHIFT)
        s0, s1, s2 = _measure(values_ptr, count, p0, p1, p2, maximum, scale, BY_WEIGHT, TILE)
        if s2 >= enough:
            low = u2
        elif s1 >= enough:
            low, high, above = u1, u2, s2
        elif s0 >= enough:
            low, high, above = u0, u1, s1
        else:
            high, above = u0, s0
        width = (high - low).to(tl.uint32, bitcast=True)
    return low, above


@triton.jit
def _choose_among(
    values_ptr,  # [count] logits in the order of their ids
    ids_ptr,  # int32 [count], None: they are 0, 1, …
    count,
    floor,  # no token below it stays
    maximum,
    total,  # weight of the whole row
    top_k,
    top_p,  # float64
    min_p,
    scale,
    seed,
    position,
    VOCAB: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The token drawn from those that top_k, then top_p, then min_p leave."""
    low, end = unit_of(floor, SHIFT), unit_of(maximum, SHIFT) + 1
    total = total.to(tl.float64)
    num_tied = VOCAB * 1.0  # of the tokens at the cut, how many stay
    if top_k < VOCAB:
        low, above = _find_cut(
            values_ptr, count, low, end, top_k.to(tl.float64), maximum, scale, False, SHIFT, TILE
        )
        num_tied = top_k - above
        cut = value_of(low, SHIFT)
        p = value_of(low + 1, SHIFT)
        heavier, _, _ = _measure(values_ptr, count, p, p, p, maximum, scale, True, TILE)
        total = heavier.to(tl.float64) + (num_tied * tl.exp((cut - maximum) * scale)).to(tl.float64)
    if top_p < 1.0:
        first = low
        low, above = _find_cut(
            values_ptr, count, low, end, top_p * total, maximum, scale, True, SHIFT, TILE
        )
        weight = tl.exp((value_of(low, SHIFT) - maximum) * scale).to(tl.float64)
        missing = (top_p * total - above.to(tl.float64)) / weight  # inf for a weight of 0
        num_needed = tl.maximum(tl.ceil(tl.minimum(missing, VOCAB * 1.0)), 1.0).to(tl.float32)
        num_tied = tl.where(low == first, tl.minimum(num_needed, num_tied), num_needed)
    cut = value_of(low, SHIFT)

    best = -float("inf")
    token_id = 0
    num_seen = 0.0
    for start in range(0, count, TILE):
        offs = start + tl.arange(0, TILE)
        x = load_logits(values_ptr, offs, count)
        inside = offs < count
        token_ids = offs if ids_ptr is None else tl.load(ids_ptr + offs, mask=inside, other=0)
        scaled = (x - maximum) * scale
        tied = (x == cut).to(tl.float32)
        rank = num_seen + tl.cumsum(tied, 0)
        num_seen += tl.sum(tied, 0)
        kept = (x > cut) | ((x == cut) & (rank <= num_tied))
        kept = kept & (tl.exp(scaled) >= min_p)
        noisy = tl.where(kept, scaled + gumbel_of_tokens(seed, position, token_ids), -float("inf"))
        score, place = tl.max(noisy, 0, return_indices=True)
        found = tl.sum(tl.where(tl.arange(0, TILE) == place, token_ids, 0), 0)
        token_id = tl.where(score > best, found, token_id)
        best = tl.maximum(score, best)
    return token_id


@triton.jit
def _floor(
    request,
    group_maxima_ptr,
    maximum,
    total,
    scale,
    VOCAB: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
):
    """A logit below which no token can stay, nor one that counts for the total of top_p."""
    top_k = tl.load(request + TOP_K_WORD)
    top_p = load_word64(request + TOP_P_WORD).to(tl.float64, bitcast=True)
    min_p = load_float(request + MIN_P_WORD)
    floor = -float("inf")
    if top_k <= NUM_GROUPS:  # as many tokens are at or above the k-th greatest of the maxima
        offs = tl.arange(0, PADDED_GROUPS)
        peaks = tl.load(group_maxima_ptr + offs, mask=offs < NUM_GROUPS, other=-float("inf"))
        low = unit_of(floor, 0)
        width = (unit_of(maximum, 0) + 1 - low).to(tl.uint32, bitcast=True)
        while width > 4096:  # 2**-11 of the value: near enough
            middle = low + (width >> 1).to(tl.int32, bitcast=True)
            if tl.sum((peaks >= value_of(middle, 0)).to(tl.int32), 0) >= top_k:
                low = middle
            width -= width >> 1
        floor = value_of(low, 0)
    # Logarithms of weights; the slack covers roundings of both, here and in the cuts.
    slack = 0.01 / scale + tl.abs(maximum) * 1e-6
    unranked_p = (top_k == VOCAB) & (top_p < 1.0)
    if unranked_p:
        rest = tl.log(((1.0 - top_p) * total.to(tl.float64) / VOCAB).to(tl.float32))
        floor = tl.maximum(floor, maximum + rest / scale - slack)
    if (min_p > 0) & ((top_k == VOCAB) | (top_p == 1.0)):
        floor = tl.maximum(floor, maximum + tl.log(min_p) / scale - slack)
    return floor


@triton.jit
def _gather_above(logits_ptr, floor, values_ptr, ids_ptr, VOCAB, CAPACITY, TILE: tl.constexpr):
    """Number of tokens at or above the floor; the first CAPACITY are written in order of ids."""
    count = 0
    following = load_logits(logits_ptr, tl.arange(0, TILE), VOCAB)
    for start in range(0, VOCAB, TILE):
        offs = start + tl.arange(0, TILE)
        x = following
        following = load_logits(logits_ptr, offs + TILE, VOCAB)
        kept = ((x >= floor) & (offs < VOCAB)).to(tl.int32)
        places = count + tl.cumsum(kept, 0) - 1
        count += tl.sum(kept, 0)
        fits = (kept > 0) & (places < CAPACITY)
        tl.store(values_ptr + places, x, mask=fits)
        tl.store(ids_ptr + places, offs, mask=fits)
    tl.debug_barrier()  # other threads of this program read what was written
    return count


@triton.jit
def draw_limited(
    logits_ptr,
    request,
    values_ptr,
    ids_ptr,
    group_maxima_ptr,
    maximum,
    total,
    VOCAB: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    scale = load_float(request + SCALE_WORD)
    floor = _floor(
        request, group_maxima_ptr, maximum, total, scale, VOCAB, NUM_GROUPS, PADDED_GROUPS
    )
    top_k = tl.load(request + TOP_K_WORD)
    top_p = load_word64(request + TOP_P_WORD).to(tl.float64, bitcast=True)
    min_p = load_float(request + MIN_P_WORD)
    seed, position = load_word64(request + SEED_WORD), tl.load(request + NUM_OUTPUTS_WORD)
    count = _gather_above(logits_ptr, floor, values_ptr, ids_ptr, VOCAB, CAPACITY, TILE)
    if count <= CAPACITY:
        token_id = _choose_among(
            values_ptr, ids_ptr, count, floor, maximum, total, top_k, top_p, min_p, scale,
            seed, position, VOCAB, SHIFT, TILE,
        )  # fmt: skip
    else:
        token_id = _choose_among(
            logits_ptr, None, VOCAB, floor, maximum, total, top_k, top_p, min_p, scale,
            seed, position, VOCAB, SHIFT, TILE,
        )  # fmt: skip
    return token_id
