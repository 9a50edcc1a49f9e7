"""One file of packed weights: written front to back, read by mapping it.

A safetensors file whose tensors start at multiples of 64 bytes, the width of a cache line and of
an AVX512 load; "~pad" tensors fill the gaps, because the format allows none. The header's metadata
hold each value's form (kernels/stored_weight.py). The header's room is reserved first and filled
last, so that a weight is written when it comes, and none has to be kept. It knows nothing of where
files lie, whether they are whole, and who uses them.
"""

import json
import mmap
import struct
import warnings
from collections.abc import Mapping
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from kernels.stored_weight import Form, Weight, restore, store

Packed: TypeAlias = Tensor | Weight

ALIGNMENT = 64
HEADER_ROOM = 1 << 20  # bytes; a layer takes about 4 KB
_LENGTH = struct.Struct("<Q")
_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class PackedWriter:
    """Writes values as they come; without `finish` the file cannot be read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._forms: dict[str, Form] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0  # of the data so far
        file.seek(HEADER_ROOM)

    def add(self, name: str, value: Packed) -> None:
        assert name not in self._forms
        self._forms[name], tensors = store(name, value)
        for key, tensor in tensors.items():
            self._append(key, tensor)
            if padding := -self._end % ALIGNMENT:
                self._append(f"~pad.{self._end}", torch.zeros(padding, dtype=torch.uint8))

    def finish(self) -> None:
        metadata = {"forms": json.dumps(self._forms)}
        header = json.dumps({"__metadata__": metadata, **self._entries}).encode()
        room = HEADER_ROOM - _LENGTH.size
        if len(header) > room:
            raise OSError(f"the header of {len(self._forms)} values exceeds {HEADER_ROOM} bytes")
        self._file.seek(0)
        self._file.write(_LENGTH.pack(room) + header.ljust(room))

    def _append(self, key: str, tensor: Tensor) -> None:
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        start, self._end = self._end, self._end + data.nbytes
        self._entries[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }


def map_packed(file: BinaryIO) -> Mapping[str, Packed]:
    """The values of a finished file, over its pages; a write to one ends the process.

    The mapping, and with it the file's open description and locks, lives as long as any tensor.
    """
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
    (length,) = _LENGTH.unpack(mapping[: _LENGTH.size])
    start = _LENGTH.size + length
    header = json.loads(mapping[_LENGTH.size : start])
    forms = json.loads(header.pop("__metadata__")["forms"])
    tensors = {key: _view(whole[start:], entry) for key, entry in header.items()}
    return {name: restore(form, tensors) for name, form in forms.items()}


def _view(data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    first, last = entry["data_offsets"]
    return data[first:last].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
