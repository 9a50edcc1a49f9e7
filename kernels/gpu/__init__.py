"""Triton kernels for NVIDIA GPUs (sm_80 and later), each beside its launcher.

The modules here import triton, which a CPU engine never needs: callers import them where they are
used. With TRITON_INTERPRET=1 Triton runs them on the CPU, which is how they are tested.
"""

import os
from functools import cache

import torch
from torch import Tensor


@cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process; it decides so when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_gpu() -> bool:
    """Whether the Triton kernels compute on a GPU; the interpreter leaves one alone."""
    return torch.cuda.is_available() and not interpreted()


def on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels compute on tensors like x."""
    return x.is_cuda or interpreted()
