"""WeightCache: the packed weights of each rank as files, made once per node and mapped by all.

The directory holds one CacheEntry per rank and key. Whoever comes first gets it from a peer or
makes it, and the others wait; what goes wrong with the files costs a warning and a private copy,
never an engine. A file is found by its name, the same on every node. This module knows neither
models nor checkpoints.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar

from engine.weights.ahead import ahead
from engine.weights.cache_entry import CacheEntry, Key, crc32_of, sync_some
from engine.weights.own_directory import check_owner, create_own, delete_left_scratch
from engine.weights.packed_file import Packed, PackedWriter, map_packed
from engine.weights.peers import Parcel, PeerError, Peers, receive

logger = logging.getLogger(__name__)

T = TypeVar("T")
Make: TypeAlias = Callable[[], Iterable[tuple[str, Packed]]]

DATA = "*.safetensors"
UNFINISHED = "*.tmp"
FULL = (errno.ENOSPC, errno.EDQUOT)


class WeightCache:
    def __init__(self, directory: Path, max_bytes: int, peers: Peers | None = None) -> None:
        """ConfigError when another user owns the directory or may write to it."""
        self.directory = directory
        self.mapped_bytes = 0  # by `load`; the kernel counts these pages as available memory
        self._max_bytes = max_bytes
        self._peers = peers
        check_owner(directory)

    def load(self, name: str, key: Key, make: Make) -> Mapping[str, Packed]:
        """The mapped values of the file for `name` and `key`, fetched or made first if need be.

        Without a usable directory, or room on its disk: the same in private memory. `make` is
        asked when no peer gives the file, and its errors are raised.
        """
        entry = CacheEntry(self.directory / f"{name}.safetensors")
        try:
            values = _map(entry, key)
            if values is None:
                values = self._make_with_room(entry, key, make)
            self.mapped_bytes += entry.data.stat().st_size
        except OSError as error:
            logger.warning(
                "weights are loaded without the cache: %s: %s; every engine of this node keeps a "
                "copy of its own. Free space there, name another directory in weights_cache, or "
                "set it to null",
                self.directory,
                error,
            )
            return self._load_privately(name, key, make)
        entry.touch()
        if self._peers is not None:
            self._peers.announce(entry.data)
        return values

    def _make_with_room(self, entry: CacheEntry, key: Key, make: Make) -> Mapping[str, Packed]:
        """On a full disk again, without the entries that nobody uses."""
        try:
            return self._make(entry, key, make)
        except OSError as error:
            if error.errno not in FULL or self._delete_unused(max_bytes=0) == 0:
                raise
            logger.warning("%s: %s; made again with what nobody uses deleted", entry.data, error)
            return self._make(entry, key, make)

    def _make(self, entry: CacheEntry, key: Key, make: Make) -> Mapping[str, Packed]:
        create_own(self.directory)
        with entry.locked(wait=True):
            # Somebody else may have made it while this process waited.
            values = _map(entry, key)
            if values is None:
                if entry.data.exists():
                    logger.warning("%s is not what was written there; made again", entry.data)
                if not self._fetch(entry, key):
                    logger.info("packing weights into %s", entry.data)
                    entry.write(key, lambda file: _pack(file, make))
                values = _map(entry, key)
            if values is None:
                raise OSError(f"{entry.data} changed right after it was written")
        try:
            self._trim()
        except OSError as error:
            logger.warning("weights cache: %s cannot be trimmed: %s", self.directory, error)
        return values

    def _load_privately(self, name: str, key: Key, make: Make) -> Mapping[str, Packed]:
        try:
            found = self._from_peers(name, key, _map_in_memory)
        except OSError as error:
            logger.warning("%s does not come from other nodes: %s", name, error)
            found = None
        return found or dict(make())

    def _fetch(self, entry: CacheEntry, key: Key) -> bool:
        """Whether a peer gave the file, which is here then. OSError is this node's fault."""

        def write(parcel: Parcel) -> bool:
            logger.info("receiving weights into %s", entry.data)
            entry.write(key, lambda file: receive(parcel, file))
            return True

        # A peer may be silent for half as long as a maker may be seen to do nothing.
        asking = entry.touch_unfinished
        return self._from_peers(entry.data.stem, key, write, asking) is not None

    def _from_peers(
        self,
        name: str,
        key: Key,
        take: Callable[[Parcel], T],
        asking: Callable[[], None] = lambda: None,
    ) -> T | None:
        """What `take` makes of the first peer's file that comes whole."""
        for peer in self._peers.holding(name) if self._peers is not None else ():
            asking()
            try:
                with peer.send(key) as parcel:
                    return take(parcel)
            except PeerError as error:
                logger.warning("%s does not come from %s: %s", name, peer.address, error)
        return None

    def _trim(self) -> None:
        """Delete what is too much, and what killed makers left."""
        self._delete_unused(self._max_bytes)
        for path in self.directory.glob(UNFINISHED):
            CacheEntry(path.with_suffix(".safetensors")).delete_unfinished()
        delete_left_scratch(self.directory)

    def _delete_unused(self, max_bytes: int) -> int:
        """Delete entries, the one unused longest first, until the rest fit; never one in use.

        Returns how many bytes are free that were not.
        """
        sizes = {}
        for path in self.directory.glob(DATA):
            with suppress(FileNotFoundError):  # another engine trims too
                sizes[CacheEntry(path)] = path.stat().st_size
        excess = sum(sizes.values()) - max_bytes
        freed = 0
        for entry in sorted(sizes, key=CacheEntry.last_used):
            if freed >= excess:
                break
            if entry.delete_unused():
                logger.info("weights cache: deleted %s, %d bytes", entry.data, sizes[entry])
                freed += sizes[entry]
        return freed


def _map(entry: CacheEntry, key: Key) -> Mapping[str, Packed] | None:
    with entry.open(key) as found:
        return map_packed(found[0]) if found is not None else None


def _map_in_memory(parcel: Parcel) -> Mapping[str, Packed]:
    with open(os.memfd_create("manta-weights"), "w+b") as file:
        receive(parcel, file)
        file.flush()
        return map_packed(file)


def _pack(file: BinaryIO, make: Make) -> int:
    writer, synced = PackedWriter(file), 0
    # Writing 1 GB takes as long as packing it; the two use different parts of the machine.
    for name, value in ahead(iter(make())):
        writer.add(name, value)
        synced = sync_some(file, synced)
    writer.finish()
    file.flush()
    return crc32_of(file, unfinished=True)
