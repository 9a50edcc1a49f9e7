"""Copies between host and device that wait for nothing.

Up: an array, or many small ones in one, through pinned memory. Down: into it, with an event.
Pinned buffers come from torch's caching allocator, which gives one out again only when the copies
that use it have run. On a CPU device both are plain tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.gpu import has_gpu

_ALIGNMENT = 4  # int32 words: kernels are compiled for pointers to multiples of 16 bytes


def pinned(array: NDArray[np.int32]) -> Tensor:
    """A copy from which a GPU can fetch while the host goes on."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if has_gpu() else tensor


def upload(arrays: Sequence[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """The arrays on the device, views of one tensor."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.size // _ALIGNMENT) * _ALIGNMENT)
    packed = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    words = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        words[start : start + array.size] = array.reshape(-1)
    packed = packed.to(device, non_blocking=True)
    return [
        packed[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


@dataclass(frozen=True, slots=True)
class Download:
    """An int32 tensor on its way to the host, in the order of the stream that made it."""

    host: Tensor
    event: torch.cuda.Event | None

    @classmethod
    def start(cls, result: Tensor) -> "Download":
        if not result.is_cuda:
            return cls(result, None)
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        host.copy_(result, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(host, event)

    def get(self) -> NDArray[np.int32]:
        if self.event is not None:
            self.event.synchronize()
        array: NDArray[np.int32] = self.host.numpy()
        return array
