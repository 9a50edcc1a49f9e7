"""Peers: what a cache asks of the other nodes, and how it takes a file from one of them.

A file comes as its manifest and its bytes in pieces; whole, with the sum its maker took, or not at
all. How pieces travel and who holds what is behind the protocol (engine/ray_weights.py). This
module knows neither Ray nor what the files hold.
"""

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.weights.cache_entry import Key, Manifest, sync_some
from engine.weights.origin import Origin

Piece: TypeAlias = NDArray[np.uint8]


class PeerError(Exception):
    """A peer, or the way to it, failed; another one may do."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A file on its way: what its maker knew of it, and its bytes, which may end in PeerError."""

    manifest: Manifest
    pieces: Iterator[Piece]


class Peer(Protocol):
    """A node that has a file."""

    @property
    def address(self) -> str: ...

    def send(self, key: Key) -> AbstractContextManager[Parcel]:
        """PeerError when it does not have the whole file for `key`, also between pieces."""


class Peers(Protocol):
    def origin(self, checkpoint: Path) -> Origin:
        """The checkpoint on this node, else as another node knows it; else as if it were here,
        so that reading it says what is missing.
        """

    def holding(self, name: str) -> Iterator[Peer]:
        """Nodes other than this one that have the file `name`; empty when nobody can be asked."""

    def announce(self, data: Path) -> None:
        """This node has that file now. Costs the caller nothing and never fails."""


def receive(parcel: Parcel, file: BinaryIO) -> int:
    """Write the parcel's bytes; returns their CRC. PeerError unless they are what was made."""
    size = crc32 = synced = 0
    for piece in parcel.pieces:
        size += piece.nbytes
        if size > parcel.manifest.size:
            raise PeerError(f"more than the {parcel.manifest.size} bytes came that were made")
        file.write(piece.data)
        crc32 = zlib.crc32(piece.data, crc32)
        synced = sync_some(file, synced)
    if (size, crc32) != (parcel.manifest.size, parcel.manifest.crc32):
        raise PeerError(
            f"{size} bytes with the sum {crc32:08x} came; {parcel.manifest.size} with "
            f"{parcel.manifest.crc32:08x} were made"
        )
    return crc32
