"""8 bits per weight with one scale per output: int8, or the floats e4m3."""

from typing import Literal

import torch
from torch import Tensor

from engine.weights.matrix import W8Matrix

W8Type = Literal["int8", "fp8"]
MAX_INT8 = 127
MAX_E4M3 = 448.0  # of float8_e4m3fn, OCP's 8-bit floating point specification 1.0


def quantize_w8(weight: Tensor, kind: W8Type) -> W8Matrix:
    """A weight [N, K] by the largest value of each output; a row of zeros has scale 1."""
    rows = weight.detach().float()
    largest = rows.abs().amax(1)
    scales = largest / (MAX_INT8 if kind == "int8" else MAX_E4M3)
    # Where the division underflows the row's values do too.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    steps = rows / scales.unsqueeze(1)
    if kind == "int8":
        return W8Matrix(steps.round_().clamp_(-MAX_INT8, MAX_INT8).to(torch.int8), scales)
    return W8Matrix(steps.clamp_(-MAX_E4M3, MAX_E4M3).to(torch.float8_e4m3fn), scales)
