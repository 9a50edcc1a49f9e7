"""GPTQ: rounding input by input with the errors fed back into the inputs to come (2210.17323).

Needs the Gram matrix of the inputs only. Each row is quantised by itself, so that rows may be
shared out among workers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantize.feedback import BLOCK, feed_back, inverse_factor
from engine.quantize.grid import Grid, in_groups
from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.method import LayerPass, LayerResult, split_outputs
from engine.quantize.statistics import Calibration
from engine.weights.matrix import Int4Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """`group_size` -1 means one group of all inputs.

    `act_order` takes the inputs with the largest sums of squares first. With `static_groups` the
    groups are those of the inputs' own order and their grids are fixed beforehand, which every
    format can store; without, groups are cut in the order of rounding (an `input_order`).
    """

    group_size: int = 128
    symmetric: bool = False
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    skip: tuple[str, ...] = ()

    def quantize_layer(self, layer: DenseLayer, calibration: Calibration) -> LayerResult:
        progress = LayerPass(layer, self.skip)
        for stage in STAGES:
            statistics, weights = calibration.statistics(layer, stage), progress.weights(stage)
            if not weights:
                continue
            # Rounded as one linear: they share the inverse, and the steps are fewer and wider.
            matrix = self.quantize(torch.cat(list(weights.values())), statistics.gram)
            sizes = {role: weight.shape[0] for role, weight in weights.items()}
            progress.replace(weights, split_outputs(matrix, sizes), statistics)
        calibration.advance(layer)
        return progress.result()

    def quantize(self, rows: Tensor, gram: Tensor) -> Int4Matrix:
        """Rows [N, K] whose inputs have the Gram matrix [K, K]."""
        order = _order(gram) if self.act_order else None
        grid = None
        if self.static_groups:
            grid = Grid.spanning(in_groups(rows, self.group_size), self.symmetric)
        columns = rows.float().t()
        columns = columns.clone() if order is None else columns[order]
        ordered = gram if order is None else gram[order][:, order]
        rounding = _Rounding(columns, self.group_size, self.symmetric, grid, order)
        feed_back(columns, inverse_factor(ordered, self.damping), rounding.nearest, rounding.block)
        return rounding.matrix()


class _Rounding:
    """Rounds columns [K, N] one after the other; keeps their levels and their groups' grids."""

    def __init__(
        self,
        columns: Tensor,
        group_size: int,
        symmetric: bool,
        grid: Grid | None,
        order: Tensor | None,
    ) -> None:
        in_features, out_features = columns.shape
        self._columns = columns
        self._size = in_groups(columns.t()[:1], group_size).shape[2]
        self._symmetric = symmetric
        self._static = grid is not None
        self._order = order
        self._input_of = range(in_features) if order is None else order.tolist()
        self._levels = torch.empty_like(columns, dtype=torch.uint8)
        shape = (in_features // self._size, out_features)
        if grid is None:
            self._scales, self._zeros = columns.new_empty(shape), columns.new_empty(shape)
        else:
            self._scales = grid.scales.squeeze(-1).t().contiguous()
            self._zeros = grid.zeros.squeeze(-1).t().contiguous()

    @property
    def block(self) -> int:
        """A group's grid is taken when its first input is reached: the group must be up to date.

        Groups therefore start where blocks do, or lie within one.
        """
        if self._static or self._size % BLOCK == 0 or self._size == len(self._input_of):
            return BLOCK
        return self._size * max(1, BLOCK // self._size)

    def nearest(self, k: int) -> Tensor:
        group = (self._input_of[k] if self._static else k) // self._size
        if not self._static and k % self._size == 0:
            self._take_grid(group, self._columns[k : k + self._size])
        scale, zero = self._scales[group], self._zeros[group]
        level = (self._columns[k] / scale).round_().add_(zero).clamp_(0, 15)
        self._levels[k] = level
        return level.sub_(zero).mul_(scale)

    def matrix(self) -> Int4Matrix:
        levels, order = self._levels, self._order
        if self._static and order is not None:
            levels, order = torch.empty_like(levels).index_copy_(0, order, levels), None
        return Int4Matrix(levels, self._zeros.to(torch.uint8), self._scales.half(), order)

    def _take_grid(self, group: int, columns: Tensor) -> None:
        grid = Grid.spanning(columns.t(), self._symmetric)
        self._scales[group], self._zeros[group] = grid.scales[:, 0], grid.zeros[:, 0]


def _order(gram: Tensor) -> Tensor:
    """int64 [K]: inputs by falling sums of squares, equal ones in their own order."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)
