"""Clip search: shrinking each group's range where the many gain more than the ends lose.

The error of a group is that of the outputs it causes alone, by its own diagonal block of the Gram
matrix (arXiv 2306.00978, §3.2, takes it over samples of the inputs). Groups add up differently in
an output, so that a row whose whole error grew keeps its full ranges.
"""

import torch
from torch import Tensor

from engine.quantize.grid import Grid
from engine.quantize.method import output_energy

# As AutoAWQ searches: down to half the range in steps of 1/20.
SHRINKS = tuple(1 - i / 20 for i in range(10))


def clipped_grid(groups: Tensor, gram: Tensor, symmetric: bool) -> Grid:
    """The grid [N, K/g, 1] of groups [N, K/g, g], whose inputs have the Gram matrix [K, K]."""
    full = Grid.spanning(groups, symmetric)
    shrunk = _best_of_groups(groups, diagonal_blocks(gram, groups.shape[2]), symmetric)
    errors = [
        output_energy((grid.nearest(groups) - groups).flatten(1), gram) for grid in (full, shrunk)
    ]
    better = (errors[1] < errors[0]).view(-1, 1, 1)
    return Grid(
        torch.where(better, shrunk.scales, full.scales),
        torch.where(better, shrunk.zeros, full.zeros),
    )


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """[K, K] -> [K/g, g, g]."""
    num_groups = gram.shape[0] // size
    blocks = gram.view(num_groups, size, num_groups, size)
    return torch.stack([blocks[group, :, group] for group in range(num_groups)])


def _best_of_groups(groups: Tensor, blocks: Tensor, symmetric: bool) -> Grid:
    """The grid [N, K/g, 1] with the least error of each group."""
    by_group = groups.transpose(0, 1).contiguous()  # [K/g, N, g], as the products want it
    best: Grid | None = None
    least = torch.empty(0)
    for shrink in SHRINKS:
        grid = Grid.spanning(by_group, symmetric, shrink)
        change = grid.nearest(by_group).sub_(by_group)
        error = torch.bmm(change, blocks).mul_(change).sum(-1, keepdim=True)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.minimum(error, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales),
            torch.where(better, grid.zeros, best.zeros),
        )
    assert best is not None
    return Grid(best.scales.transpose(0, 1), best.zeros.transpose(0, 1))
