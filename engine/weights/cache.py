"""WeightCache: the packed weights of each rank as files, made once per node and mapped by all.

The directory holds one CacheEntry per rank and key. Whoever comes first makes it and the others
wait; what goes wrong with the files costs a warning and a private copy, never an engine. A file is
found by its name, so that one made on another node may be put here with its manifest. This module
knows neither models nor checkpoints.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from engine.errors import ConfigError
from engine.weights.cache_entry import CacheEntry, Key, Make
from engine.weights.packed_file import Packed

logger = logging.getLogger(__name__)

DATA = "*.safetensors"
UNFINISHED = "*.tmp"
OTHERS_WRITE = 0o022


class WeightCache:
    def __init__(self, directory: Path, max_bytes: int) -> None:
        """ConfigError when another user owns the directory or may write to it."""
        self.directory = directory
        self.mapped_bytes = 0  # by `load`; the kernel counts these pages as available memory
        self._max_bytes = max_bytes
        _check_owner(directory)

    def load(self, name: str, key: Key, make: Make) -> Mapping[str, Packed]:
        """The mapped values of the file for `name` and `key`, made first if it is not there.

        Without a usable directory, or room on its disk: what `make` gives, in private memory.
        """
        entry = CacheEntry(self.directory / f"{name}.safetensors")
        try:
            values = entry.open(key)
            if values is None:
                values = self._make(entry, key, make)
            self.mapped_bytes += entry.data.stat().st_size
        except OSError as error:
            logger.warning(
                "weights are loaded without the cache: %s: %s; every engine of this node keeps a "
                "copy of its own. Free space there, name another directory in weights_cache, or "
                "set it to null",
                self.directory,
                error,
            )
            return dict(make())
        entry.touch()
        return values

    def _make(self, entry: CacheEntry, key: Key, make: Make) -> Mapping[str, Packed]:
        _create_own(self.directory)
        with entry.locked(wait=True):
            # Somebody else may have made it while this process waited.
            values = entry.open(key)
            if values is None:
                if entry.data.exists():
                    logger.warning("%s is not what was written there; made again", entry.data)
                logger.info("packing weights into %s", entry.data)
                entry.write(key, make)
                values = entry.open(key)
            if values is None:
                raise OSError(f"{entry.data} changed right after it was written")
        try:
            self._trim()
        except OSError as error:
            logger.warning("weights cache: %s cannot be trimmed: %s", self.directory, error)
        return values

    def _trim(self) -> None:
        """Delete entries, the one unused longest first, until the rest fit; never one in use."""
        sizes = {}
        for path in self.directory.glob(DATA):
            with suppress(FileNotFoundError):  # another engine trims too
                sizes[CacheEntry(path)] = path.stat().st_size
        excess = sum(sizes.values()) - self._max_bytes
        for entry in sorted(sizes, key=CacheEntry.last_used):
            if excess <= 0:
                break
            if entry.delete_unused():
                logger.info("weights cache: deleted %s, %d bytes", entry.data, sizes[entry])
                excess -= sizes[entry]
        for path in self.directory.glob(UNFINISHED):
            CacheEntry(path.with_suffix(".safetensors")).delete_unfinished()


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
