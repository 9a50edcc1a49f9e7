"""Int4Matrix from rows of q whose groups are cut, reordered or uneven.

The kernels want groups of equal size that follow each other, in multiples of 32 inputs. A cut at
a multiple of 32 repeats scales. For any other, and for inputs whose groups are scattered
(act-order), the inputs are sorted by group and each group is filled up with zero-weight rows. This
module knows no format's layout.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from engine.weights.matrix import Int4Matrix

STEP = 32  # inputs: the smallest group that the int4 kernels take


def group_slice(inputs: slice, group_size: int) -> slice:
    """The groups, of inputs in their own order, that a run of inputs touches."""
    return slice(inputs.start // group_size, -(-inputs.stop // group_size))


def group_indices(inputs: slice, group_size: int) -> Tensor:
    """int64 [K]: which of `group_slice` each input of a run is in."""
    first = int(inputs.start) // group_size
    return torch.arange(inputs.start, inputs.stop) // group_size - first


def in_order(
    q: Tensor, zeros: Tensor, scales: Tensor, inputs: slice, group_size: int
) -> Int4Matrix:
    """q [K, N] of a run of inputs; zeros and scales of `group_slice(inputs, group_size)`."""
    size = cut_size(inputs, group_size)
    if size is None:
        return by_group(q, zeros, scales, group_indices(inputs, group_size))
    if len(scales) * size == len(q):
        return Int4Matrix(q, zeros, scales)
    groups = group_indices(inputs, group_size)[::size]
    return Int4Matrix(q, zeros[groups], scales[groups])


def cut_size(inputs: slice, group_size: int) -> int | None:
    """The group size with which a run of inputs, in their own order, needs no padding.

    None when that would be too small for the kernels, though `group_size` is not.
    """
    groups = group_slice(inputs, group_size)
    if groups.stop - groups.start == 1:
        return int(inputs.stop) - int(inputs.start)
    size = math.gcd(inputs.start, inputs.stop, group_size)
    return None if size % STEP and not group_size % STEP else size


def padded_inputs(inputs: slice, group_size: int) -> int:
    """The inputs of a run, each group of it filled up to a multiple of STEP."""
    groups = group_slice(inputs, group_size)
    inner = (group * group_size for group in range(groups.start + 1, groups.stop))
    edges = [inputs.start, *inner, inputs.stop]
    return sum(-(-(stop - start) // STEP) * STEP for start, stop in pairwise(edges))


def by_group(q: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Int4Matrix:
    """q [K, N], zeros and scales [G, N], and the group of each input, int64 [K].

    Groups that come out equal, if all are there or the kernels take the size, keep it; others are
    filled up to multiples of STEP.
    """
    order = torch.argsort(group_of, stable=True)
    counts = torch.bincount(group_of, minlength=len(scales))
    present = counts.nonzero().squeeze(1)
    counts = counts[present]
    even = bool((counts == counts[0]).all())
    if not even or (len(present) < len(scales) and int(counts[0]) % STEP):
        return _filled(q[order], zeros[present], scales[present], order, counts)
    if torch.equal(order, torch.arange(len(order))):
        return Int4Matrix(q, zeros[present], scales[present])
    return Int4Matrix(q[order], zeros[present], scales[present], order)


def _filled(q: Tensor, zeros: Tensor, scales: Tensor, order: Tensor, counts: Tensor) -> Int4Matrix:
    """Rows sorted by group, `counts` of each -> groups of STEP inputs."""
    filled = (counts + STEP - 1) // STEP * STEP
    first, first_filled = counts.cumsum(0) - counts, filled.cumsum(0) - filled
    place = torch.arange(len(q)) + (first_filled - first).repeat_interleave(counts)
    rows = zeros.repeat_interleave(filled, 0)
    rows[place] = q
    input_order = order[first].repeat_interleave(filled)
    input_order[place] = order
    repeats = filled // STEP
    return Int4Matrix(
        rows, zeros.repeat_interleave(repeats, 0), scales.repeat_interleave(repeats, 0), input_order
    )


def side_by_side(parts: list[Int4Matrix]) -> Int4Matrix | None:
    """The parts' outputs end to end; None when their inputs are not in one order.

    Where group sizes differ, all take the largest that divides each, with repeated scales.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(_same_inputs(first, part) for part in parts):
        return None
    size = math.gcd(*(part.group_size for part in parts))
    repeats = [part.group_size // size for part in parts]
    return Int4Matrix(
        torch.cat([part.q for part in parts], dim=1),
        _joined([part.zeros for part in parts], repeats),
        _joined([part.scales for part in parts], repeats),
        first.input_order,
    )


def _same_inputs(a: Int4Matrix, b: Int4Matrix) -> bool:
    if a.input_order is None or b.input_order is None:
        return a.input_order is b.input_order and len(a.q) == len(b.q)
    return torch.equal(a.input_order, b.input_order)


def _joined(values: list[Tensor], repeats: list[int]) -> Tensor:
    pairs = zip(values, repeats, strict=True)
    return torch.cat([v if n == 1 else v.repeat_interleave(n, 0) for v, n in pairs], dim=1)
