"""Packed weights taken apart into plain tensors and facts, and put together again over them.

What `store` returns can be written to a file; `restore` computes nothing and copies nothing, so
that a weight restored over a mapped file is that file's pages. Which weights it may be given back
to is said by `layouts()`.
"""

from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernels import cpu
from kernels.cpu.int4 import AmxInt4Weight
from kernels.dense_linear import DenseWeight, multiplies_bf16
from kernels.gpu.w4a16_pack import W4A16Weight
from kernels.int4_aten import AtenInt4Weight, FewRows
from kernels.int8_linear import Int8Weight
from kernels.opaque import is_opaque, opaque_bytes, opaque_tensor

Weight: TypeAlias = DenseWeight | AmxInt4Weight | AtenInt4Weight | W4A16Weight | Int8Weight
Form: TypeAlias = Any  # JSON

# Raised with every change of a layout: of what a packed weight's bytes mean.
PACKING_VERSION = 2

_CLASSES = {
    kind.__name__: kind
    for kind in (DenseWeight, AmxInt4Weight, AtenInt4Weight, W4A16Weight, FewRows, Int8Weight)
}


def store(name: str, value: Tensor | Weight) -> tuple[Form, dict[str, Tensor]]:
    """Its form, and its tensors by names that begin with `name`; they share the value's memory."""
    tensors: dict[str, Tensor] = {}
    return _store(name, value, tensors), tensors


def restore(form: Form, tensors: dict[str, Tensor]) -> Any:
    """What `store` took apart, over `tensors`, which may hold more."""
    if isinstance(form, list):
        return tuple(form)
    if not isinstance(form, dict):
        return form
    if "tensor" in form:
        return tensors[form["tensor"]]
    if "opaque" in form:
        name, dtype = form["opaque"], getattr(torch, form["dtype"])
        memory, descriptor = tensors[name], tensors[f"{name}.layout"]
        return opaque_tensor(memory, descriptor, tuple(form["shape"]), dtype)
    parts = {key: restore(part, tensors) for key, part in form.items() if key != "class"}
    return _CLASSES[form["class"]](**parts)


def layouts() -> dict[str, str | int | bool]:
    """What the bytes of packed weights depend on besides the checkpoint and the settings.

    aten's and oneDNN's layouts belong to one torch version and instruction set. The AMX kernel's
    does not, but whether this installation has that kernel decides which weights exist.
    """
    return {
        "packing": PACKING_VERSION,
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "bf16": multiplies_bf16(),
        "vnni": torch.cpu._is_vnni_supported(),
        "native": cpu.library() is not None,
    }


def _store(name: str, value: Any, tensors: dict[str, Tensor]) -> Form:
    if isinstance(value, Tensor) and is_opaque(value):
        tensors[name], tensors[f"{name}.layout"] = opaque_bytes(value)
        dtype = str(value.dtype).removeprefix("torch.")
        return {"opaque": name, "shape": list(value.shape), "dtype": dtype}
    if isinstance(value, Tensor):
        assert value.is_contiguous(), f"{name} would change its layout"
        tensors[name] = value
        return {"tensor": name}
    if is_dataclass(value):
        parts = {
            field.name: _store(f"{name}.{field.name}", getattr(value, field.name), tensors)
            for field in fields(value)
        }
        return {"class": type(value).__name__, **parts}
    if isinstance(value, tuple):
        return list(value)
    assert value is None or isinstance(value, (bool, int)), f"{name} is {value!r}"
    return value
