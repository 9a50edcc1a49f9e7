"""Tensors that end where their memory ends: one byte further is a page that nobody may touch."""

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor) -> Tensor:
    """A copy with its last byte before a forbidden page.

    What reads or writes behind it ends the process with SIGSEGV. A slice of rows comes back with
    its strides: the storage up to its last element is what is copied.
    """
    if tensor.numel() == 0:
        return tensor
    places = zip(tensor.shape, tensor.stride(), strict=True)
    flat = tensor.as_strided((1 + sum((size - 1) * step for size, step in places),), (1,))
    num_bytes = flat.numel() * tensor.element_size()
    pages = -(-num_bytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.c_void_p(address + pages * PAGE)
    assert _libc.mprotect(guard, ctypes.c_size_t(PAGE), PROT_NONE) == 0
    array = torch.frombuffer(
        memory, dtype=tensor.dtype, count=flat.numel(), offset=pages * PAGE - num_bytes
    )
    return array.copy_(flat).as_strided(tensor.shape, tensor.stride())
