"""Partials: a matrix product cut along K, whose consumer adds up the parts.

A decode product has few tiles: cutting K fills the GPU, and the kernel that reads the result next
sums the parts on the way, in a fixed order, without atomics or a launch of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gpu import on_gpu


@dataclass(frozen=True, slots=True)
class Partials:
    """y [M, N] = data.sum(0) + bias, to be rounded to `dtype`."""

    data: Tensor  # float32 [splits, M, N]
    bias: Tensor | None  # [N]
    dtype: torch.dtype

    def sum(self) -> Tensor:
        """[M, N]; for consumers that cannot sum by themselves, as a reduction over ranks."""
        if on_gpu(self.data):
            from kernels.gpu.partials import sum_partials

            return sum_partials(self)
        total = self.data.sum(0)
        return (total if self.bias is None else total + self.bias.float()).to(self.dtype)


def summed(x: Tensor | Partials) -> Tensor:
    return x.sum() if isinstance(x, Partials) else x
