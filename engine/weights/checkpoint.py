"""Checkpoint: the tensors of a safetensors checkpoint by name, whole or in slices.

Reads one `model.safetensors`, or the files named by `model.safetensors.index.json`. Headers are
compared with what a model expects before any weight is read; `read_finite` refuses NaN and
infinity. It knows nothing of models, formats or ranks.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
FLOATS = ("BF16", "F16", "F32")
ALL = slice(None)


ANY_LENGTH = -1


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    shape: tuple[int, ...]  # (1,) stands for () too; ANY_LENGTH for any number
    dtypes: tuple[str, ...] = FLOATS  # safetensors' names
    hint: str = ""  # what to look at when the shape is another

    def fits(self, found: "StoredTensor") -> bool:
        shape = found.shape if self.shape != (1,) or found.shape else (1,)
        return (
            found.dtype in self.dtypes
            and len(shape) == len(self.shape)
            and all(
                want in (have, ANY_LENGTH) for want, have in zip(self.shape, shape, strict=True)
            )
        )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    file: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """Open files of one checkpoint; a context manager, because the files are memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        self._handles: dict[str, Any] = {}
        self._stack = ExitStack()
        file_of = _read_index(path)
        for file in sorted(set(file_of.values())) or [SINGLE_FILE]:
            self._open_file(file, file_of)
        for name, file in file_of.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{path / INDEX_FILE} places the tensor {name} in {file}, which lacks it"
                )

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def verify(
        self,
        expected: Mapping[str, ExpectedTensor],
        harmless: Iterable[str] = (),
        optional: Mapping[str, ExpectedTensor] | None = None,
    ) -> None:
        """Every expected tensor exists with its shape and dtype, and nothing else does.

        Optional ones have theirs if they exist; `harmless` are the endings of names that may be
        there without being used.
        """
        optional = optional or {}
        for name, want in (dict(optional) | dict(expected)).items():
            if name not in self.tensors:
                if name not in expected:
                    continue
                raise CheckpointError(
                    f"{self.path}: the tensor {name} {list(want.shape)} is missing"
                )
            found = self.tensors[name]
            if not want.fits(found):
                raise CheckpointError(
                    f"{self.path / found.file}: the tensor {name} should be {list(want.shape)} "
                    f"of {' or '.join(want.dtypes)}, found {list(found.shape)} of {found.dtype}"
                    + (f"; {want.hint}" if want.hint else "")
                )
        endings = tuple(harmless)
        for name, found in self.tensors.items():
            if name not in expected and name not in optional and not name.endswith(endings):
                raise CheckpointError(
                    f"{self.path / found.file}: the tensor {name} {list(found.shape)} has no "
                    "place in this architecture"
                )

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """A copy of the tensor, or of its part; only the pages of that part are read."""
        stored = self.tensors[name]
        if not stored.shape:
            scalar: Tensor = self._handles[stored.file].get_tensor(name)
            return scalar.reshape(1)
        part = self._handles[stored.file].get_slice(name)
        value: Tensor = part[rows, columns] if len(stored.shape) == 2 else part[rows]
        # A view of the mapping would keep the file's pages, and its mercy, for ever.
        return value.clone()

    def read_finite(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """`read`, of floats; CheckpointError when one of them is NaN or infinite."""
        value = self.read(name, rows, columns)
        # The sum tells, in 0.1 s per GB (isfinite: 1.5 s) and only when a checkpoint is packed. One
        # that is not finite needs a closer look: large values may overflow it.
        wide = value.float() if value.element_size() == 1 else value
        if not wide.sum().isfinite() and not wide.isfinite().all():
            bad = int((~wide.isfinite()).sum())
            raise CheckpointError(
                f"{self.path / self.tensors[name].file}: the tensor {name} holds {bad} values that "
                "are NaN or infinite; fetch or export the checkpoint again"
            )
        return value

    def _open_file(self, file: str, file_of: Mapping[str, str]) -> None:
        path = self.path / file
        if not path.is_file():
            raise CheckpointError(f"{self.path / INDEX_FILE} names {file}, which does not exist")
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        except SafetensorError as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} ({size} bytes) is truncated or not a safetensors file: {error}"
            ) from error
        self._handles[file] = handle
        for name in handle.keys():  # noqa: SIM118 - safe_open is not a mapping
            if file_of.get(name, file) != file:
                continue  # the index prefers another file's copy
            part = handle.get_slice(name)
            self.tensors[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; empty for a single-file checkpoint."""
    if (path / SINGLE_FILE).is_file():
        return {}
    index = path / INDEX_FILE
    if not index.is_file():
        pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{path} holds pickle weights only ({', '.join(pickles[:3])}), which can run code "
                "when read; convert them to safetensors"
            )
        raise CheckpointError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read weight_map in {index}: {error!r}") from error
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    return dict(weight_map)
