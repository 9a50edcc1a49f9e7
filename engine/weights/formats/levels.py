"""Levels: unsigned values of 2, 4 or 8 bits with a zero and a scale per group of inputs and output.

What GPTQ and compressed-tensors store, once unpacked; and the checks of what they share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint
from engine.weights.formats.groups import (
    STEP,
    by_group,
    cut_size,
    group_indices,
    in_order,
    padded_inputs,
)
from engine.weights.formats.weight_format import Part
from engine.weights.matrix import Matrix, W8Matrix

MIDDLE = 128  # of 8 bits: the zero point of symmetric values
BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Levels:
    """A run of inputs, `group_of` int64 [K] the group of each; None: in order of their groups."""

    q: Tensor  # uint8 [K, N]
    zeros: Tensor  # uint8 [G, N]
    scales: Tensor  # float [G, N]
    inputs: slice
    group_size: int
    group_of: Tensor | None
    bits: int

    def matrix(self) -> Matrix:
        """Up to 4 bits an Int4Matrix; 8 bits with one symmetric scale per output a W8Matrix.

        Other 8 bits are dequantised: no kernel multiplies by them.
        """
        q, zeros, scales = self.q, self.zeros, self.scales
        if self.bits <= 4 and self.group_of is None:
            return in_order(q, zeros, scales, self.inputs, self.group_size)
        if self.bits <= 4:
            assert self.group_of is not None
            return by_group(q, zeros, scales, self.group_of)
        if len(scales) == 1 and bool((zeros == MIDDLE).all()):
            return W8Matrix((q ^ MIDDLE).view(torch.int8).t().contiguous(), scales[0].float())
        groups = self.group_of
        if groups is None:
            groups = group_indices(self.inputs, self.group_size)
        weight = (q.float() - zeros.float()[groups]) * scales.float()[groups]
        return weight.t().contiguous()


def int4_shape(part: Part, bits: int, group_size: int, act_order: bool) -> tuple[int, int] | None:
    """WeightFormat.int4_shape of Levels."""
    num_inputs = part.inputs.stop - part.inputs.start
    if bits > 4:
        return None
    if act_order and num_inputs < part.in_features and group_size < part.in_features:
        # Of every group some inputs are here, and on average half a step is missing.
        groups = num_groups(part.in_features, group_size)
        return -(-(num_inputs + groups * STEP // 2) // STEP) * STEP, STEP
    size = cut_size(part.inputs, group_size)
    return (padded_inputs(part.inputs, group_size), STEP) if size is None else (num_inputs, size)


def num_groups(in_features: int, group_size: int) -> int:
    return -(-in_features // group_size)


def groups_hint(group_size: int) -> str:
    """What to look at when a tensor's shape contradicts the group size."""
    return (
        f"its groups follow from group_size {group_size} of the quantization settings: correct "
        "that if the weights were quantised with another"
    )


def read_group_of(checkpoint: Checkpoint, name: str, part: Part, group_size: int) -> Tensor | None:
    """int64 [K] of the part's inputs from a `g_idx` [in_features]; None: they are in order.

    CheckpointError names a group that there is not.
    """
    group_of = checkpoint.read(name, part.inputs).to(torch.int64)
    last = num_groups(part.in_features, group_size) - 1
    wrong = group_of[(group_of < 0) | (group_of > last)]
    if len(wrong):
        raise CheckpointError(
            f"{checkpoint.path}: the tensor {name} names group {int(wrong[0])}, but there are "
            f"groups 0 to {last}; fetch or export the checkpoint again"
        )
    in_place = torch.arange(part.inputs.start, part.inputs.stop) // group_size
    return None if torch.equal(group_of, in_place) else group_of
