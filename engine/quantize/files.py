"""Files that are whole or not there, and what a disk that takes no more of them means.

A file is written beside its place, synced and renamed. Tensors are written one by one, so that a
shard of 5 GB needs the memory of its largest tensor. This module knows no models.
"""

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from engine.errors import CheckpointError

Fill: TypeAlias = Callable[[BinaryIO], None]

UNFINISHED = ".tmp"
SYNC_BYTES = 1 << 28  # written back as it comes, not all at the end
# EFBIG: a limit on the size of files (ulimit -f, or a file system's own).
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_LENGTH = struct.Struct("<Q")
_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """What a header says of a tensor, and how to get its values when they are written."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        return cls(tuple(tensor.shape), _NAMES[tensor.dtype], lambda: tensor)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def write_whole(path: Path, fill: Fill) -> None:
    """`path` is the old file or the whole new one, also after a loss of power."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(content)

    write_whole(path, fill)


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> None:
    """A safetensors file, equal for equal tensors, whatever the order they are given in."""
    # Wide items first: every tensor then starts at a multiple of its item's size.
    names = sorted(tensors, key=lambda name: (-_ITEM_BYTES[tensors[name].dtype], name))
    header = _header([(name, tensors[name]) for name in names], metadata)

    def fill(file: BinaryIO) -> None:
        file.write(header)
        synced = 0
        for name in names:
            file.write(_bytes_of(name, tensors[name]))
            if file.tell() - synced > SYNC_BYTES:
                file.flush()
                os.fsync(file.fileno())
                synced = file.tell()

    write_whole(path, fill)


def sync_directory(directory: Path) -> None:
    """Makes renames in it outlast a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(directory: Path, needed: int) -> Iterator[None]:
    """CheckpointError for a disk that is full or takes nothing.

    `needed`: bytes that the whole job writes there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise CheckpointError(
                f"{directory} takes no more ({error.strerror}); the job needs {human(needed)} "
                "there in all. Free space, or raise the limit, and run the same command again: it "
                "goes on after the last whole layer"
            ) from error
        if error.filename is not None and directory not in Path(str(error.filename)).parents:
            raise CheckpointError(
                f"cannot read or write {error.filename}: {error.strerror}; mend that, and run the "
                "same command again: it goes on after the last whole layer"
            ) from error
        raise CheckpointError(
            f"cannot write to {directory}: {error}; mend that, or choose another work dir"
        ) from error


def human(num_bytes: int) -> str:
    """1.5 GiB, 20 MiB, 3 KiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{-(-num_bytes // 1024)} KiB"


def _header(tensors: Sequence[tuple[str, LazyTensor]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.num_bytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _bytes_of(name: str, lazy: LazyTensor) -> memoryview:
    tensor = lazy.read()
    assert (tuple(tensor.shape), _NAMES[tensor.dtype]) == (lazy.shape, lazy.dtype), name
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data.data)
