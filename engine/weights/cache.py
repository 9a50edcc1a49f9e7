"""WeightCache: the packed weights of each rank as files, made once per node and mapped by all.

    NAME-KEY.rank0-of-2.safetensors   the weights (engine/weights/packed_file.py)
    NAME-KEY.rank0-of-2.json          its manifest, written last: what it was made from, size, sum
    NAME-KEY.rank0-of-2.lock          held by whoever makes or evicts it
    NAME-KEY.rank0-of-2.tmp           half-written: under its maker's lock, or left by a dead one

A file is in use as long as a process holds a shared lock on it, which its mapping does. Both locks
are flock's: they end with their holder, however it ends. It is found by its name, so a file made
elsewhere may be put here with its manifest. This module knows neither models nor checkpoints.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from engine.errors import ConfigError
from engine.weights.packed_file import Packed, PackedWriter, map_packed

logger = logging.getLogger(__name__)

Make: TypeAlias = Callable[[], Iterable[tuple[str, Packed]]]
Key: TypeAlias = Mapping[str, Any]  # JSON

OTHERS_WRITE = 0o022
CHUNK = 1 << 22  # bytes read at once for a sum


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What tells a whole file from any other.

    ctime_ns is the file's last change of any kind, which no program can set: as long as it is
    what the maker saw, nothing was written since, and a file of 1 GB is trusted in microseconds.
    Otherwise (it was copied, restored, written to) its sum decides, about 1 s per GB.
    """

    key: Key
    size: int
    ctime_ns: int
    crc32: int


class WeightCache:
    def __init__(self, directory: Path, max_bytes: int) -> None:
        """ConfigError when another user owns the directory or may write to it."""
        self.directory = directory
        self._max_bytes = max_bytes
        _check_owner(directory)

    def load(self, name: str, key: Key, make: Make) -> Mapping[str, Packed]:
        """The mapped values of the file for `name` and `key`, made first if it is not there.

        Without a usable directory, or room on its disk: what `make` gives, in private memory.
        """
        path = self.directory / f"{name}.safetensors"
        try:
            values = _open_whole(path, key)
            if values is None:
                values = self._make(path, key, make)
        except OSError as error:
            logger.warning(
                "weights are loaded without the cache: %s: %s; every engine of this node now "
                "keeps a copy of its own. Free space there, name another directory in "
                "weights_cache, or set it to null",
                self.directory, error,
            )  # fmt: skip
            return dict(make())
        with suppress(OSError):
            os.utime(_manifest_path(path))  # when it was last used
        return values

    def _make(self, path: Path, key: Key, make: Make) -> Mapping[str, Packed]:
        _create_own(self.directory)
        with _locked(path.with_suffix(".lock"), wait=True):
            # Somebody else may have made it while this process waited.
            values = _open_whole(path, key)
            if values is None:
                if path.exists():
                    logger.warning("%s is not what was written there; made again", path)
                _write(path, key, make)
                values = _open_whole(path, key)
            if values is None:
                raise OSError(f"{path} changed right after it was written")
        self._evict()
        return values

    def _evict(self) -> None:
        """Delete files, least recently used first, until the rest fit; never one in use."""
        sizes = _sizes(self.directory.glob("*.safetensors"))
        excess = sum(sizes.values()) - self._max_bytes
        for path in sorted(sizes, key=_last_used):
            if excess <= 0:
                break
            if _delete_unused(path):
                logger.info("weights cache: deleted %s, %d bytes", path, sizes[path])
                excess -= sizes[path]
        for left in self.directory.glob("*.tmp"):
            with suppress(BlockingIOError), _locked(left.with_suffix(".lock"), wait=False):
                left.unlink(missing_ok=True)


def _open_whole(path: Path, key: Key) -> Mapping[str, Packed] | None:
    """The mapped values; None when there is no file, or not the whole of it."""
    try:
        manifest = _Manifest(**json.loads(_manifest_path(path).read_text()))
        with path.open("rb") as file:
            # The mapping keeps this lock after the file object is closed.
            flock(file, LOCK_SH | LOCK_NB)
            if manifest.key != key or not _is_whole(file, manifest):
                return None
            return map_packed(file)
    except (FileNotFoundError, BlockingIOError):  # absent, or being evicted
        return None
    except (ValueError, TypeError):  # no manifest
        return None


def _is_whole(file: BinaryIO, manifest: _Manifest) -> bool:
    found = os.fstat(file.fileno())
    if found.st_nlink == 0 or found.st_size != manifest.size:
        return False
    return found.st_ctime_ns == manifest.ctime_ns or _crc32(file) == manifest.crc32


def _write(path: Path, key: Key, make: Make) -> None:
    """Under the maker's lock. Whatever interrupts it, the manifest fits no file but a whole one."""
    unfinished = path.with_suffix(".tmp")
    logger.info("packing weights into %s", path)
    try:
        with unfinished.open("w+b") as file:
            unfinished.chmod(0o600)
            writer = PackedWriter(file)
            for name, value in make():
                writer.add(name, value)
            writer.finish()
            _sync(file)
            crc32 = _crc32(file)
            unfinished.rename(path)
            found = os.fstat(file.fileno())  # after the rename, which is a change too
        manifest = _Manifest(key, found.st_size, found.st_ctime_ns, crc32)
        with unfinished.open("w+b") as file:
            file.write(json.dumps(asdict(manifest), indent=1).encode())
            _sync(file)
            unfinished.rename(_manifest_path(path))
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _delete_unused(path: Path) -> bool:
    """Whether nobody used it, so that it is gone."""
    try:
        with _locked(path.with_suffix(".lock"), wait=False) as lock, path.open("rb") as file:
            flock(file, LOCK_EX | LOCK_NB)
            for gone in (_manifest_path(path), path, lock):
                gone.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


@contextmanager
def _locked(lock: Path, *, wait: bool) -> Iterator[Path]:
    """Hold the lock file alone; BlockingIOError when somebody else does and `wait` is false."""
    while True:
        with lock.open("ab") as file:
            try:
                flock(file, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                logger.info("waiting for the process that holds %s", lock)
                flock(file, LOCK_EX)
            # An evictor may have deleted the file under the waiting process.
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            yield lock
            return


def _check_owner(directory: Path) -> None:
    """What is mapped is computed with: nobody else may put a file here."""
    try:
        found = directory.stat()
    except OSError:  # not there yet: `_create_own` makes it, or says why it cannot
        return
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"weights_cache {directory} belongs to user {found.st_uid}, this process to "
            f"{os.geteuid()}; name a directory of your own, or null"
        )
    if found.st_mode & OTHERS_WRITE:
        raise ConfigError(
            f"others may write to weights_cache {directory} (mode {found.st_mode & 0o777:o}); "
            f"run: chmod 700 {directory}"
        )


def _create_own(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    _check_owner(directory)


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _sizes(paths: Iterable[Path]) -> dict[Path, int]:
    sizes = {}
    for path in paths:
        with suppress(FileNotFoundError):  # somebody else evicts too
            sizes[path] = path.stat().st_size
    return sizes


def _last_used(path: Path) -> float:
    """The manifest's time, set at each use; a file without one goes first."""
    try:
        return _manifest_path(path).stat().st_mtime
    except FileNotFoundError:
        return 0.0


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
