"""C++ kernels for CPUs with AMX, compiled when the package is installed.

Optional: without a compiler, or on another CPU, `library()` is None and every launcher in kernels/
computes with torch. They are plain C functions over pointers; bf16 only.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ABI = "manta_abi_1"  # elementwise.cpp
_SIGNATURES = {
    "manta_int4_linear": [_POINTER] * 6 + [_LONG] * 5 + [_INT] * 2,
    "manta_decode_attention": [_POINTER] * 5 + [_LONG] * 8 + [_FLOAT, _INT],
    "manta_rms_norm_heads": [_POINTER] * 2 + [_LONG] * 4 + [_FLOAT, _INT],
    "manta_add_rms_norm": [_POINTER] * 5 + [_LONG] * 2 + [_FLOAT, _INT],
    "manta_rope": [_POINTER] * 3 + [_LONG] * 5 + [_INT],
    "manta_silu_mul": [_POINTER] * 2 + [_LONG] * 2 + [_INT],
    "manta_store_kv": [_POINTER] * 3 + [_LONG] * 5,
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, if this installation has them and this CPU can run them."""
    found = find_spec("kernels.cpu._native")
    if found is None or found.origin is None or not _has_instructions():
        return None
    loaded = ctypes.CDLL(found.origin)
    if not hasattr(loaded, _ABI):
        raise ImportError(
            f"{found.origin} was compiled from other sources than these; run pip install again"
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def library_for(x: Tensor) -> ctypes.CDLL | None:
    """`library()` where it computes on tensors like x: bf16 on the CPU, rows dense."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.stride(-1) != 1:
        return None
    return library()


def check_dense(tensor: Tensor, shape: Sequence[int]) -> None:
    """An operand that a kernel reads by address alone: a wrong one would be read as memory."""
    assert tensor.dtype == torch.bfloat16, tensor.dtype
    assert tensor.shape == tuple(shape), (tensor.shape, shape)
    assert tensor.is_contiguous()


def _has_instructions() -> bool:
    """Asks Linux for the right to use tiles, too: every process has to, once."""
    return bool(
        torch.cpu._is_avx512_bf16_supported()
        and torch.cpu._is_amx_tile_supported()
        and torch.cpu._init_amx()
    )
