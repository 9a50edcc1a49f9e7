"""CacheEntry: one file of packed weights that is whole or not there, and who holds it.

    NAME.safetensors   the weights (engine/weights/packed_file.py)
    NAME.json          its manifest, written last: what it was made from, its size and sum
    NAME.lock          held by whoever makes or deletes it
    NAME.tmp           being written under that lock, or left by a maker that was killed

The file is in use as long as a process holds a shared lock on it, which its mapping does. Both
locks are flock's, which end with their holder, however it ends. This module knows neither the
directory's other files nor what the weights are.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from engine.weights.packed_file import Packed, PackedWriter, map_packed

logger = logging.getLogger(__name__)

Make: TypeAlias = Callable[[], Iterable[tuple[str, Packed]]]
Key: TypeAlias = Mapping[str, Any]  # JSON: all that the weights depend on

CHUNK = 1 << 22  # bytes read at once for a sum


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What tells the whole file from any other.

    ctime_ns is the file's last change of any kind, which no program can set: as long as it is
    what the maker saw, nothing was written since, and a file of 1 GB is trusted in microseconds.
    Otherwise (it was copied, restored, written to) its sum decides, about 1 s per GB, once.
    """

    key: Key
    size: int
    ctime_ns: int
    crc32: int


@dataclass(frozen=True, slots=True)
class CacheEntry:
    data: Path  # NAME.safetensors

    @property
    def manifest(self) -> Path:
        return self.data.with_suffix(".json")

    @property
    def unfinished(self) -> Path:
        return self.data.with_suffix(".tmp")

    def open(self, key: Key) -> Mapping[str, Packed] | None:
        """Map it; None when there is no file for this key, or not the whole of it."""
        try:
            manifest = _Manifest(**json.loads(self.manifest.read_text()))
            with self.data.open("rb") as file:
                # The mapping keeps this lock after the file object is closed.
                flock(file, LOCK_SH | LOCK_NB)
                whole = manifest.key == key and self._is_whole(file, manifest)
                return map_packed(file) if whole else None
        except (FileNotFoundError, BlockingIOError):  # absent, or being deleted
            return None
        except (ValueError, TypeError):  # no manifest
            return None

    def write(self, key: Key, make: Make) -> None:
        """Under the lock. Whatever interrupts it, the manifest fits no file but a whole one."""
        try:
            with self.unfinished.open("w+b") as file:
                self.unfinished.chmod(0o600)
                writer = PackedWriter(file)
                for name, value in make():
                    writer.add(name, value)
                writer.finish()
                _sync(file)
                crc32 = _crc32(file)
                self.unfinished.rename(self.data)
                found = os.fstat(file.fileno())  # after the rename, which is a change too
            self._write_manifest(_Manifest(key, found.st_size, found.st_ctime_ns, crc32))
        except BaseException:
            self.unfinished.unlink(missing_ok=True)
            raise

    def touch(self) -> None:
        """Note that it was used, where the directory may be written to."""
        with suppress(OSError):
            os.utime(self.manifest)

    def last_used(self) -> float:
        """Seconds since the epoch; 0 without a manifest."""
        try:
            return self.manifest.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def delete_unused(self) -> bool:
        """Whether nobody used it, so that it is gone."""
        try:
            with self.locked(wait=False) as lock, self.data.open("r+b") as file:
                flock(file, LOCK_EX | LOCK_NB)  # NFS wants a file open for writing
                for gone in (self.manifest, self.data, lock):
                    gone.unlink(missing_ok=True)
        except (FileNotFoundError, BlockingIOError):
            return False
        return True

    def delete_unfinished(self) -> None:
        """What a killed maker left, unless somebody is making the file now."""
        with suppress(BlockingIOError), self.locked(wait=False):
            self.unfinished.unlink(missing_ok=True)

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[Path]:
        """Hold the lock alone; BlockingIOError when somebody else does and `wait` is false."""
        path = self.data.with_suffix(".lock")
        while True:
            with path.open("ab") as file:
                try:
                    flock(file, LOCK_EX | LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        raise
                    logger.info("waiting for the process that holds %s", path)
                    flock(file, LOCK_EX)
                # Whoever deleted the entry deleted this file under the waiting process.
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue
                yield path
                return

    def _is_whole(self, file: BinaryIO, manifest: _Manifest) -> bool:
        found = os.fstat(file.fileno())
        if found.st_nlink == 0 or found.st_size != manifest.size:
            return False
        if found.st_ctime_ns == manifest.ctime_ns:
            return True
        if _crc32(file) != manifest.crc32:
            return False
        # Spare the next engine the sum, where this one may write and nobody makes the file.
        with suppress(OSError), self.locked(wait=False):
            self._write_manifest(replace(manifest, ctime_ns=found.st_ctime_ns))
        return True

    def _write_manifest(self, manifest: _Manifest) -> None:
        with self.unfinished.open("wb") as file:
            file.write(json.dumps(asdict(manifest), indent=1).encode())
            _sync(file)
            self.unfinished.rename(self.manifest)
        _sync_directory(self.data.parent)


def _crc32(file: BinaryIO) -> int:
    file.seek(0)
    value = 0
    while chunk := file.read(CHUNK):
        value = zlib.crc32(chunk, value)
    return value


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Makes the renames outlast a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
