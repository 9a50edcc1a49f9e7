"""Draw: one token per row from a table of weights, by inverse CDF in token-id order.

Knows weights, uniforms, top_k, top_p and min_p; nothing of requests, seeds or edits. A row's
weights are exp((logit - max) / temperature) in float32, so the most likely token weighs exactly 1.
The token drawn with u is the first whose cumulative weight (float64) exceeds u × total: it depends
on that row only, and a token of weight 0 is never drawn.

Of the weights, top_k keeps the k largest, then top_p the smallest set that holds top_p of what is
left, then min_p those of at least min_p times the largest. Of equal weights the lower id counts
as larger.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Cumulative sums run over blocks first, then inside one block: on 256 × 32000 float32 and one
# core, 2 ms instead of 58 for a float64 cumsum of everything (and argmax 2 ms instead of 20).
_BLOCK = 256

# Rows whose top_k or top_p cut lies within the largest 128 tokens need no sort.
# torch.topk on 256 × 32000: 19 ms for 64, 26 for 128, 39 for 256.
_CANDIDATES = 128

_SORTED_AT_ONCE = 64  # rows; six tables of 64 × 152k float32 are 230 MB


@dataclass(frozen=True, slots=True)
class Limits:
    """min_p of all G rows, and what F of them have besides; columns, so that they broadcast."""

    min_p: Tensor | None  # [G, 1] float32, 0 for ranked rows; None when all are 0
    ranked: "RankLimits | None"


@dataclass(frozen=True, slots=True)
class RankLimits:
    """Limits of the F rows that have top_k or top_p."""

    rows: Tensor | None  # [F] among the G, None for all
    top_k: Tensor  # [F, 1] int64, vocab_size when off
    top_p: Tensor  # [F, 1] float64: 0.3 in float32 would keep a fourth of ten equal tokens
    min_p: Tensor  # [F, 1] float32

    def take(self, rows: Tensor) -> "RankLimits":
        return RankLimits(None, self.top_k[rows], self.top_p[rows], self.min_p[rows])


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest id of the greatest value and that value, [S] each; NaN counts as the greatest."""
    block = _reduce_blocks(logits, torch.amax).argmax(dim=1, keepdim=True)
    columns = _columns(block).clamp_(max=logits.shape[1] - 1)
    inside = logits.gather(1, columns)
    best = inside.argmax(dim=1, keepdim=True)
    return columns.gather(1, best)[:, 0], inside.gather(1, best)[:, 0]


def weigh_(logits: Tensor, maxima: Tensor, inverse_temperature: Tensor | None) -> Tensor:
    """Turn logits [S, V] into weights in place; inverse_temperature [S, 1], None for all 1."""
    logits.sub_(maxima[:, None])
    if inverse_temperature is not None:
        logits.mul_(inverse_temperature)
    return logits.exp_()


def draw(weights: Tensor, uniforms: Tensor, limits: Limits) -> Tensor:
    """One token per row of weights [G, V], which are overwritten; uniforms [G, 1] → [G]."""
    if limits.min_p is not None:
        _keep_at_least_(weights, limits.min_p)
    sums = _cumulate(weights)
    ranked = limits.ranked
    if ranked is None:
        return _locate(weights, sums, uniforms * sums[:, -1:])[:, 0]
    if ranked.rows is None:
        return _draw_ranked(weights, sums[:, -1:], uniforms, ranked)[:, 0]
    token_ids = _locate(weights, sums, uniforms * sums[:, -1:])
    rows = ranked.rows
    token_ids[rows] = _draw_ranked(weights[rows], sums[rows, -1:], uniforms[rows], ranked)
    return token_ids[:, 0]


def _draw_ranked(weights: Tensor, totals: Tensor, uniforms: Tensor, limits: RankLimits) -> Tensor:
    token_ids, unsettled = _draw_among_largest(weights, totals, uniforms, limits)
    if weights.shape[1] > _CANDIDATES:
        late = unsettled[:, 0].nonzero()[:, 0]  # waits for the device
        for start in range(0, len(late), _SORTED_AT_ONCE):
            rows = late[start : start + _SORTED_AT_ONCE]
            token_ids[rows] = _draw_after_sort(weights[rows], uniforms[rows], limits.take(rows))
    return token_ids


def _draw_among_largest(
    weights: Tensor, totals: Tensor, uniforms: Tensor, limits: RankLimits
) -> tuple[Tensor, Tensor]:
    """Draw from [F, V] by looking at the largest weights only: tokens [F, 1], unsettled [F, 1].

    totals and uniforms are [F, 1]. An unsettled row's cut lies beyond the candidates or among
    weights equal to the least of them; its token means nothing.
    """
    vocab_size = weights.shape[1]
    num_candidates = min(_CANDIDATES, vocab_size)
    values, token_ids = weights.topk(num_candidates, dim=1)
    mass = values.cumsum(1, dtype=torch.float64)
    k = limits.top_k
    total_of_k = mass.gather(1, k.clamp(max=num_candidates) - 1)
    totals = torch.where(k <= num_candidates, total_of_k, totals)
    reached = (mass < limits.top_p * totals).sum(1, keepdim=True) + 1
    count = _fewest(k, limits.top_p, reached)
    least = values.gather(1, count.clamp(max=num_candidates) - 1)
    # When top_k is larger than the candidates, top_p has no total to go by.
    total_unknown = (k > num_candidates) & (k < vocab_size) & (limits.top_p < 1.0)
    last = values[:, -1:]  # when it weighs nothing or too little, all that may stay is here
    beyond = (last >= limits.min_p) & ((count > num_candidates) | (least <= last))
    unsettled = (last > 0) & (total_unknown | beyond)

    token_ids, order = token_ids.sort(dim=1)
    values = values.gather(1, order)
    tied = values == least
    num_ties = count - (values > least).sum(1, keepdim=True)
    kept = (values > least) | (tied & (tied.cumsum(1) <= num_ties))
    sums = (values * (kept & (values >= limits.min_p))).cumsum(1, dtype=torch.float64)
    found = torch.searchsorted(sums, uniforms * sums[:, -1:], right=True)
    return token_ids.gather(1, found.clamp_(max=num_candidates - 1)), unsettled


def _draw_after_sort(weights: Tensor, uniforms: Tensor, limits: RankLimits) -> Tensor:
    """Draw from [U, V] wherever the cuts are: tokens [U, 1]. Sorts values only."""
    vocab_size = weights.shape[1]
    ascending = _sort(weights)
    ranked = ascending.flip(1)
    # float32 like the weights: torch compares and multiplies mixed types ten times slower on CPU
    places = torch.arange(vocab_size, dtype=torch.float32, device=weights.device)
    places = places.expand_as(weights)
    eligible = _compare(torch.lt, places, limits.top_k.to(torch.float32)).mul_(ranked)
    sums = _cumulate(eligible)
    reached = _locate(eligible, sums, _next_below(limits.top_p * sums[:, -1:])) + 1
    count = _fewest(limits.top_k, limits.top_p, reached)

    least = ranked.gather(1, count - 1)
    num_above = vocab_size - torch.searchsorted(ascending, least, right=True)
    kept = _compare(torch.eq, weights, least)
    last_tie = _locate(kept, _cumulate(kept), (count - num_above).to(torch.float64) - 0.5)
    kept.mul_(_compare(torch.le, places, last_tie.to(torch.float32)))
    kept.add_(_compare(torch.gt, weights, least)).mul_(weights)
    _keep_at_least_(kept, limits.min_p)
    sums = _cumulate(kept)
    return _locate(kept, sums, uniforms * sums[:, -1:])


def _keep_at_least_(weights: Tensor, min_p: Tensor) -> None:
    """Zero the weights below min_p [S, 1] in place."""
    weights.mul_(_compare(torch.ge, weights, min_p))


def _cumulate(weights: Tensor) -> Tensor:
    """Cumulative sums over blocks of a row, float64 [S, ceil(V / block)]; the last is the total."""
    return _reduce_blocks(weights, torch.sum).cumsum(1, dtype=torch.float64)


def _locate(weights: Tensor, cumulated: Tensor, targets: Tensor) -> Tensor:
    """First column whose cumulative weight exceeds its row's target in [0, total), as [S, 1].

    `cumulated` is `_cumulate(weights)`. Rows with NaN get any column.
    """
    vocab_size = weights.shape[1]
    block = torch.searchsorted(cumulated, targets, right=True).clamp_(max=cumulated.shape[1] - 1)
    before = cumulated.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    columns = _columns(block)
    inside = weights.gather(1, columns.clamp(max=vocab_size - 1)).to(torch.float64)
    sums = inside.masked_fill_(columns >= vocab_size, 0.0).cumsum(1)
    # The float32 sum that chose the block may exceed the block's float64 sum by rounding.
    rest = torch.minimum(targets - before, _next_below(sums[:, -1:]))
    found = torch.searchsorted(sums, rest, right=True).clamp_(max=_BLOCK - 1)
    return columns.gather(1, found).clamp_(max=vocab_size - 1)


def _fewest(top_k: Tensor, top_p: Tensor, reached: Tensor) -> Tensor:
    """How many of the largest stay; top_p = 1 keeps all, however the sums were rounded."""
    return torch.where(top_p < 1.0, torch.minimum(reached, top_k), top_k)


def _columns(block: Tensor) -> Tensor:
    """Columns [S, block] of block [S, 1]; those of the last may lie beyond the row."""
    return block * _BLOCK + torch.arange(_BLOCK, device=block.device)


def _reduce_blocks(x: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """[S, V] → [S, ceil(V / block)] without a copy of x."""
    whole = x.shape[1] // _BLOCK * _BLOCK
    parts = []
    if whole > 0:
        parts.append(reduce(x[:, :whole].view(len(x), -1, _BLOCK), 2))
    if whole < x.shape[1]:
        parts.append(reduce(x[:, None, whole:], 2))
    return torch.cat(parts, dim=1)


def _compare(op: Callable[..., Tensor], left: Tensor, right: Tensor) -> Tensor:
    """op as float32 0 or 1 of left's shape; bool takes 12 instead of 4 ms at 256 × 32000 on CPU."""
    return op(left, right, out=torch.empty(left.shape, device=left.device))


def _next_below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def _sort(weights: Tensor) -> Tensor:
    """Ascending values; numpy's vectorised sort takes a twentieth of torch's time on CPU."""
    if weights.device.type == "cpu":
        return torch.from_numpy(np.sort(weights.numpy(), axis=1))
    return weights.sort(dim=1).values
