"""Hashes of prompt beginnings, by which equal ones are recognised: in a cache and between replicas.

Blocks are hashed with everything before them. Hashes are the same in every process.
"""

import hashlib
from array import array
from collections.abc import Sequence

SHORT_BYTES = 8  # of a hash's 16, where a collision only sends a request to the wrong engine


def root_hash(salt: str | None) -> bytes:
    """What precedes block 0: the tenant's salt, so that salted caches never meet."""
    return b"" if salt is None else _digest(salt.encode())


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """128 bits over the previous block's hash and this block's tokens: no collisions to check."""
    return _digest(parent + array("i", token_ids).tobytes())


def short(full: bytes) -> int:
    return int.from_bytes(full[:SHORT_BYTES], "little")


def prefix_hashes(token_ids: Sequence[int], block_size: int, salt: str | None) -> list[int]:
    """Short hashes of the beginnings of a prompt that a cache may hold, the shortest first.

    As in the cache, at least one token is left to compute. About 1 µs per block.
    """
    hashes: list[int] = []
    parent = root_hash(salt)
    for start in range(0, (len(token_ids) - 1) // block_size * block_size, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size])
        hashes.append(short(parent))
    return hashes


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
