"""CacheEntry: one file that is whole or not there, and who holds it.

    NAME.safetensors   the content
    NAME.json          its manifest, written last: what it was made from, its size and sum
    NAME.lock          held by whoever makes or deletes it; names that process
    NAME.tmp           being written under that lock, or left by a maker that was killed

The file is in use as long as a process holds a shared lock on it, which a mapping of it does. Both
locks are flock's, which end with their holder, however it ends. This module knows neither the
directory's other files nor what the content is, and needs no torch: a process that only sends the
file imports it.
"""

import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

logger = logging.getLogger(__name__)

Key: TypeAlias = Mapping[str, Any]  # JSON: all that the content depends on
Fill: TypeAlias = Callable[[BinaryIO], int]  # writes the content, returns its CRC

CHUNK = 1 << 22  # bytes read at once for a sum
POLL_S = 0.02  # between two tries for a lock that somebody holds
NAME_HOLDER_AFTER_S = 5.0
# A maker writes a weight, or touches the file, every few ms; but it stops for a sync of at most
# SYNC_BYTES, 2 MB/s, and for a peer that is silent for 60 s.
STALLED_AFTER_S = 120.0
SYNC_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Manifest:
    """What tells the whole file from any other.

    ctime_ns is the file's last change of any kind, which no program can set: as long as it is
    what the maker saw, nothing was written since, and a file of 1 GB is trusted in microseconds.
    Otherwise (it was copied, restored, written to) its sum decides, about 0.3 s per GB, once.
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

    @property
    def lock(self) -> Path:
        return self.data.with_suffix(".lock")

    @contextmanager
    def open(self, key: Key) -> Iterator[tuple[BinaryIO, Manifest] | None]:
        """The file, in use while it or a mapping of it is open; None when there is no file for
        this key, or not the whole of it.
        """
        try:
            manifest = Manifest(**json.loads(self.manifest.read_text()))
            file = self.data.open("rb")
        except (FileNotFoundError, ValueError, TypeError):  # absent, or no manifest
            yield None
            return
        with file:
            yield (file, manifest) if manifest.key == key and self._hold(file, manifest) else None

    def write(self, key: Key, fill: Fill) -> None:
        """Under the lock. Whatever interrupts it, the manifest fits no file but a whole one."""
        try:
            with self.unfinished.open("w+b") as file:
                self.unfinished.chmod(0o600)
                crc32 = fill(file)
                _sync(file)
                self.unfinished.rename(self.data)
                found = os.fstat(file.fileno())  # after the rename, which is a change too
            self._write_manifest(Manifest(key, found.st_size, found.st_ctime_ns, crc32))
        except BaseException:
            self.unfinished.unlink(missing_ok=True)
            raise

    def touch_unfinished(self) -> None:
        """Under the lock: show those who wait for it that its holder works."""
        self.unfinished.touch(mode=0o600)

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
            with self.locked(wait=False), self.data.open("r+b") as file:
                flock(file, LOCK_EX | LOCK_NB)  # NFS wants a file open for writing
                for gone in (self.manifest, self.data, self.lock):
                    gone.unlink(missing_ok=True)
        except (FileNotFoundError, BlockingIOError):
            return False
        return True

    def delete_unfinished(self) -> None:
        """What a killed maker left, unless somebody is making the file now."""
        with suppress(BlockingIOError), self.locked(wait=False):
            self.unfinished.unlink(missing_ok=True)

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[None]:
        """Hold the lock alone.

        While somebody else does: BlockingIOError, at once if `wait` is false, else when the
        holder has done nothing for STALLED_AFTER_S.
        """
        waiting = _Waiting(self)
        while True:
            with self.lock.open("ab", buffering=0) as file:
                try:
                    flock(file, LOCK_EX | LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        raise
                    waiting.check()
                    time.sleep(POLL_S)
                    continue
                # Whoever deleted the entry deleted this file under the waiting process.
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue
                with suppress(OSError):  # the disk is full; those who wait can do without
                    file.truncate(0)
                    file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
                yield
                return

    def _hold(self, file: BinaryIO, manifest: Manifest) -> bool:
        """Whether it is whole; it is in use from now on."""
        try:
            flock(file, LOCK_SH | LOCK_NB)
        except BlockingIOError:  # being deleted
            return False
        found = os.fstat(file.fileno())
        if found.st_nlink == 0 or found.st_size != manifest.size:
            return False
        if found.st_ctime_ns == manifest.ctime_ns:
            return True
        if crc32_of(file) != manifest.crc32:
            return False
        # Spare the next engine the sum, where this one may write and nobody makes the file.
        with suppress(OSError), self.locked(wait=False):
            self._write_manifest(replace(manifest, ctime_ns=found.st_ctime_ns))
        return True

    def _write_manifest(self, manifest: Manifest) -> None:
        with self.unfinished.open("wb") as file:
            file.write(json.dumps(asdict(manifest), indent=1).encode())
            _sync(file)
            self.unfinished.rename(self.manifest)
        _sync_directory(self.data.parent)


class _Waiting:
    """How long a process has waited for the holder of an entry's lock, and seen it do nothing."""

    def __init__(self, entry: CacheEntry) -> None:
        self._entry = entry
        self._since = self._moved = time.monotonic()
        self._progress: tuple[int, int, int] | None = None
        self._named = False

    def check(self) -> None:
        """Log the holder once; BlockingIOError when it has stalled."""
        now, progress = time.monotonic(), self._seen()
        if progress != self._progress:
            self._progress, self._moved = progress, now
        if now - self._since > NAME_HOLDER_AFTER_S and not self._named:
            self._named = True
            logger.warning("waiting for process %s, which holds %s", self._holder(), self._lock)
        if now - self._moved > STALLED_AFTER_S:
            raise BlockingIOError(
                f"process {self._holder()} holds {self._lock} and has written nothing for "
                f"{STALLED_AFTER_S:.0f} s; end it if it hangs"
            )

    @property
    def _lock(self) -> Path:
        return self._entry.lock

    def _seen(self) -> tuple[int, int, int] | None:
        """What changes while the holder works."""
        try:
            found = self._entry.unfinished.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _holder(self) -> str:
        try:
            return self._lock.read_text() or "unknown"
        except FileNotFoundError:
            return "unknown"


def crc32_of(file: BinaryIO, *, unfinished: bool = False) -> int:
    """Of the whole file; one that is `unfinished` is touched, because others wait for it."""
    file.seek(0)
    value = 0
    while chunk := file.read(CHUNK):
        value = zlib.crc32(chunk, value)
        if unfinished:
            os.utime(file.fileno())
    return value


def sync_some(file: BinaryIO, synced: int) -> int:
    """Sync what was written since `synced` bytes were, if that is much; returns how many are now.

    A single sync of a large file could take longer than a maker may be seen to do nothing.
    """
    if file.tell() - synced < SYNC_BYTES:
        return synced
    _sync(file)
    return file.tell()


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
