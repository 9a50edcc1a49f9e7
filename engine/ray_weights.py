"""RayPeers: which nodes of the Ray cluster hold which weights, and bringing them from there.

Every engine writes into the cluster's key-value store (Ray's GCS) what it has mapped and where. A
node that joins reads it and starts a task on a node named there, which sends the file in pieces
through the object stores: it needs an idle worker there, no engine. Pieces belong to the receiver,
so they are freed as it writes them, and when it dies.

docs/architecture.md says why no Serve deployment actor does this.
"""

import json
import logging
import mmap
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.config import EngineConfig
from engine.weights.ahead import ahead
from engine.weights.cache_entry import CacheEntry, Key, Manifest
from engine.weights.origin import Fingerprint, Origin, settings_files
from engine.weights.peers import Parcel, PeerError, Piece
from engine.weights.settings import SettingsCopies

logger = logging.getLogger(__name__)

NAMESPACE = "manta-weights-2"  # counts the forms of Announcement
PIECE_BYTES = 32 << 20
PIECES_AHEAD = 2  # in the sender's object store; the receiver's holds two more
SILENCE_S = 60.0  # a peer that sends nothing for so long is given up

Stream: TypeAlias = "ray.ObjectRefGenerator"


@dataclass(frozen=True, slots=True)
class Announcement:
    """One node holds one file of one checkpoint, and the checkpoint's settings."""

    data: str  # path there
    checkpoint: str
    files: Fingerprint
    settings: str  # path there
    settings_id: str
    weights_id: str
    seen: float  # when a node read this version of the checkpoint; seconds since the epoch


@dataclass(frozen=True, slots=True)
class RayPeer:
    """A node that has announced a file."""

    address: str  # Ray's id of the node
    data: str

    @contextmanager
    def send(self, key: Key) -> Iterator[Parcel]:
        """PeerError when it does not have the whole file for `key`, also between pieces."""
        task = _on(
            self.address,
            _send_file,
            num_returns="streaming",
            _generator_backpressure_num_objects=PIECES_AHEAD,
        )
        stream = task.remote(self.data, dict(key))
        pieces = ahead(_items(stream))
        try:
            manifest = next(pieces, None)
            if not isinstance(manifest, Manifest):
                raise PeerError("it sent nothing")
            yield Parcel(manifest, pieces)
        finally:
            ray.cancel(stream)  # no effect on one that has ended
            pieces.close()


class RayPeers:
    """`engine.weights.peers.Peers` of this node, for one model."""

    def __init__(self, model: str, directory: Path) -> None:
        """`model` is the same on all nodes, `directory` this node's cache."""
        self._prefix = f"{Path(model).absolute()}\n"
        self._copies = SettingsCopies(directory)
        self._node: str = ray.get_runtime_context().get_node_id()
        self._origin: Origin | None = None
        self._seen = time.time()

    @classmethod
    def of(cls, config: EngineConfig) -> "RayPeers | None":
        """None without Ray, where the engines of a node share nothing, and for weights that each
        node quantises for itself.
        """
        directory = config.weights_cache_directory()
        if directory is None or config.quantize is not None or not ray.is_initialized():
            return None
        return cls(config.model, directory)

    def origin(self, checkpoint: Path) -> Origin:
        """The checkpoint on this node, else the version last read elsewhere, its settings here."""
        self._origin = Origin.at(checkpoint)
        if not self._origin.has_weights:
            self._origin = self._elsewhere() or self._origin
        return self._origin

    def holding(self, name: str) -> Iterator[RayPeer]:
        """In any order, so that many that join do not all ask one."""
        found = [
            RayPeer(node, each.data)
            for node, each in self._announced()
            if Path(each.data).stem == name and node != self._node
        ]
        yield from random.sample(found, len(found))

    def announce(self, data: Path) -> None:
        """In the background: a file that nobody knows of is made twice, no more.

        Once per load: should the GCS lose it, joining nodes do without this one. One that was
        deleted here since costs a joining node a task that finds nothing.
        """
        threading.Thread(target=self._announce, args=(data,), daemon=True).start()

    def _announce(self, data: Path) -> None:
        origin = self._origin
        assert origin is not None, "origin() comes first"
        announcement = Announcement(
            data=str(data.absolute()),
            checkpoint=origin.checkpoint,
            files=origin.files,
            settings=str(origin.settings.resolve()),
            settings_id=origin.settings_id,
            weights_id=origin.weights_id,
            seen=self._seen,
        )
        try:
            key = f"{self._prefix}{data.stem}\n{self._node}"
            _internal_kv_put(key, json.dumps(asdict(announcement)), namespace=NAMESPACE)
        except RayError as error:
            logger.warning("other nodes cannot be told of %s: %s", data, error)

    def _announced(self) -> list[tuple[str, Announcement]]:
        """By nodes that live, each with its id; what dead ones announced is forgotten."""
        found = []
        try:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
            for key in _internal_kv_list(self._prefix, namespace=NAMESPACE):
                node = key.decode().rsplit("\n", 1)[1]
                if node not in alive:
                    _internal_kv_del(key, namespace=NAMESPACE)
                elif value := _internal_kv_get(key, namespace=NAMESPACE):
                    found.append((node, Announcement(**json.loads(value))))
        except RayError as error:
            logger.warning("the cluster cannot be asked who holds weights: %s", error)
        return found

    def _elsewhere(self) -> Origin | None:
        """The newest version that a node of the cluster announced."""
        announced = sorted(self._announced(), key=lambda each: each[1].seen, reverse=True)
        for node, each in announced:
            try:
                settings = self._settings(node, each)
            except PeerError as error:
                logger.warning("%s does not come from %s: %s", each.settings, node, error)
                continue
            self._seen = each.seen
            return Origin(
                each.checkpoint, each.files, settings, each.settings_id, each.weights_id, here=False
            )
        return None

    def _settings(self, node: str, announcement: Announcement) -> Path:
        """Copies of the checkpoint's settings, brought from `node` if they are not here."""
        version = announcement.checkpoint, announcement.settings_id
        found = self._copies.find(*version)
        if found is not None:
            return found
        try:
            coming = _on(node, _send_settings).remote(announcement.settings)
            contents = ray.get(coming, timeout=SILENCE_S)
        except RayError as error:
            raise PeerError(_reason(error)) from error
        return self._copies.keep(*version, contents)


def _send_settings(directory: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in settings_files(Path(directory))}


def _send_file(data: str, key: dict[str, Any]) -> Iterator[Manifest | Piece]:
    """Its manifest, then its pieces; in use until the last one is taken."""
    with CacheEntry(Path(data)).open(key) as found:
        if found is None:
            raise PeerError(f"{data} is not there any more")
        file, manifest = found
        yield manifest
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for start in range(0, manifest.size, PIECE_BYTES):
            count = min(PIECE_BYTES, manifest.size - start)
            yield np.frombuffer(mapped, np.uint8, count, start)


def _on(node: str, task: Callable[..., Any], **options: Any) -> Any:
    """The task for that node; nobody else may run it, nor again."""
    remote: Any = ray.remote(task)
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return remote.options(num_cpus=0, max_retries=0, scheduling_strategy=affinity, **options)


def _items(stream: Stream) -> Iterator[Any]:
    """What it yields; PeerError when the sender failed, died or says nothing."""
    try:
        while True:
            silent_at = time.monotonic() + SILENCE_S
            if not ray.wait([stream], timeout=SILENCE_S)[0]:
                raise PeerError(f"it sent nothing for {SILENCE_S:.0f} s")
            yield ray.get(next(stream), timeout=max(0.0, silent_at - time.monotonic()))
    except StopIteration:
        return
    except RayError as error:
        raise PeerError(_reason(error)) from error


def _reason(error: RayError) -> str:
    """Without the sender's stack."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    first_line, _, _ = str(cause).strip().partition("\n")
    return f"{type(cause).__name__}: {first_line}" if first_line else type(cause).__name__
