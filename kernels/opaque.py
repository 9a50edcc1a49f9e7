"""oneDNN's opaque tensors as plain bytes, and tensors over such bytes, which are not copied.

A weight in oneDNN's blocked layout has no storage that torch would show, but it is one run of
bytes and a descriptor (772 bytes in oneDNN 3). AOTInductor freezes such weights the same way,
through the same C functions. Bytes and descriptor belong to one torch version and instruction
set; the number of threads changes neither (torch 2.13, AMX).
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
CODES = {
    torch.bfloat16: "aoti_torch_dtype_bfloat16",
    torch.float16: "aoti_torch_dtype_float16",
    torch.float32: "aoti_torch_dtype_float32",
    torch.int8: "aoti_torch_dtype_int8",
}


def is_opaque(tensor: Tensor) -> bool:
    return bool(tensor.layout == torch._mkldnn)  # type: ignore[attr-defined]


def opaque_bytes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor's own memory, valid while it lives, and its descriptor; both uint8 [n]."""
    size = torch.ops.mkldnn._nbytes(tensor)
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(tensor))
    return (
        torch.frombuffer(memory, dtype=torch.uint8),
        torch.ops.mkldnn._get_mkldnn_serialized_md(tensor),
    )


def opaque_tensor(
    memory: Tensor, descriptor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The tensor that `opaque_bytes` took apart, over `memory` itself."""
    assert memory.dtype == descriptor.dtype == torch.uint8
    native, handle = _library(), _POINTER()
    sizes = (_LONG * len(shape))(*shape)
    strides = (_LONG * len(shape))()  # the descriptor has them
    status = native.aoti_torch_create_tensor_from_blob_v2(
        memory.data_ptr(),
        len(shape),
        sizes,
        strides,
        0,
        getattr(native, CODES[dtype])(),
        native.aoti_torch_device_type_cpu(),
        -1,
        ctypes.byref(handle),
        native.aoti_torch_layout__mkldnn(),
        descriptor.data_ptr(),
        descriptor.numel(),
    )
    assert status == 0, "torch could not read a descriptor it has written"
    tensor: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(handle))
    assert torch.ops.mkldnn._nbytes(tensor) == memory.numel()
    # The tensor does not own its memory. An attribute lives as long as the tensor does.
    tensor.manta_memory = memory  # type: ignore[attr-defined]
    return tensor


def _capsule(handle: ctypes.c_void_p) -> Any:
    """A pointer as Python's C interface hands it around."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [_POINTER, ctypes.c_char_p, _POINTER]
    return new(handle, None, None)


@cache
def _library() -> ctypes.CDLL:
    """torch's C interface for compiled models."""
    native = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in ("aoti_torch_layout__mkldnn", "aoti_torch_device_type_cpu", *CODES.values()):
        getattr(native, name).restype = _INT
    create = native.aoti_torch_create_tensor_from_blob_v2
    create.restype = _INT
    create.argtypes = [
        _POINTER, _LONG, _POINTER, _POINTER, _LONG, _INT, _INT, _INT, _POINTER, _INT, _POINTER,
        _LONG,
    ]  # fmt: skip
    return native
