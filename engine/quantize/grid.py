"""Grid: the 16 values that every group of a weight may take, and rounding to the nearest.

The last dimension is always that of a group's values. Scales are values of float16, as files
store them, so that what is rounded, measured and written is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.weights.matrix import Int4Matrix

# Rows of a weight that are worked on at once: a layer's temporaries stay a few MB.
ROWS = 512

MAX_LEVEL = 15
SYMMETRIC_ZERO = 8

# Below its normal numbers float16 goes on in steps of 2**-24: 1.6 % of 2**-18, which moves the
# ends of a group's range by 1/8 of a level at most. A larger bound would round small groups to 0.
MIN_SCALE = 2.0**-18
MAX_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Values (level - zero) * scale for levels 0 to 15."""

    scales: Tensor  # float32 [..., 1]
    zeros: Tensor  # float32 [..., 1]

    @classmethod
    def spanning(cls, groups: Tensor, symmetric: bool, shrink: float = 1.0) -> "Grid":
        """The grid of each group [..., g] from its lowest to its highest value.

        Symmetric ones have the zero 8 and reach 7.5 scales either way, so that both ends are half
        a scale from a level at most. `shrink` leaves that part of the range; values beyond it
        become its ends.
        """
        # torch's aminmax takes 1.5 ns a value, the two alone 0.2 (AVX2).
        lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if symmetric:
            reach = torch.maximum(-lowest, highest) * shrink
            scales = stored_scales(reach * (2 / MAX_LEVEL))
            return cls(scales, torch.full_like(scales, SYMMETRIC_ZERO))
        # Including 0 keeps the zero point within 4 bits when a group is all of one sign.
        lowest, highest = lowest.clamp(max=0.0) * shrink, highest.clamp(min=0.0) * shrink
        scales = stored_scales((highest - lowest) / MAX_LEVEL)
        return cls(scales, (-lowest / scales).round_().clamp_(0, MAX_LEVEL))

    def nearest(self, values: Tensor) -> Tensor:
        """values [..., g] -> the nearest of the grid's, in a new tensor."""
        levels = (values / self.scales).round_().add_(self.zeros).clamp_(0, MAX_LEVEL)
        return levels.sub_(self.zeros).mul_(self.scales)

    def levels(self, values: Tensor) -> Tensor:
        """values [..., g] -> the nearest levels, uint8 [..., g]."""
        levels = (values / self.scales).round_().add_(self.zeros)
        return levels.clamp_(0, MAX_LEVEL).to(torch.uint8)

    def matrix(self, levels: Tensor, input_order: Tensor | None = None) -> Int4Matrix:
        """levels [N, K/g, g] of this grid [N, K/g, 1] -> the matrix."""
        q = levels.flatten(1).t().contiguous()
        zeros = self.zeros.squeeze(-1).t().contiguous().to(torch.uint8)
        scales = self.scales.squeeze(-1).t().contiguous().half()
        return Int4Matrix(q, zeros, scales, input_order)


def round_rows(weight: Tensor, group_size: int, grid_of: Callable[[Tensor], Grid]) -> Int4Matrix:
    """A weight [N, K] at the nearest values of the grid that `grid_of` gives for some groups.

    It takes groups [rows, K/g, g] and gives a grid [rows, K/g, 1].
    """
    levels, grids = [], []
    for rows in torch.split(weight, ROWS):
        groups = in_groups(rows, group_size)
        grids.append(grid_of(groups))
        levels.append(grids[-1].levels(groups))
    grid = Grid(
        torch.cat([each.scales for each in grids]), torch.cat([each.zeros for each in grids])
    )
    return grid.matrix(torch.cat(levels))


def stored_scales(scales: Tensor) -> Tensor:
    """As float16 will hold them, in float32."""
    return scales.clamp(MIN_SCALE, MAX_SCALE).half().float()


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] -> float32 [N, K/g, g]; a group size of -1 means one group of all inputs."""
    in_features = weight.shape[1]
    size = in_features if group_size == -1 else group_size
    if size < 1 or in_features % size:
        raise ConfigError(
            f"group_size {group_size} does not divide the {in_features} inputs of a linear; "
            "give a divisor, or -1 for one group of all inputs"
        )
    return weight.detach().float().reshape(weight.shape[0], -1, size)
