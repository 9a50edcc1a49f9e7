"""WeightCache with peers: whole files only, fetched once, and another source when one fails."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.weights import cache_entry
from engine.weights.cache import WeightCache
from engine.weights.cache_entry import CacheEntry, Key, Manifest
from engine.weights.origin import Origin
from engine.weights.own_directory import create_own
from engine.weights.packed_file import Packed
from engine.weights.peers import Parcel, PeerError, Piece
from tests.test_weight_cache import DEADLINE_S, KEY, NO_LIMIT, Maker, assert_equal, spawn, values

PIECE = 1 << 19  # two to three pieces of a file


@dataclass
class DiskPeer:
    """A peer whose disk is a directory here; `spoil` has its way with what it sends."""

    data: Path
    spoil: Callable[[Iterator[Piece]], Iterator[Piece]] = iter
    sent: int = 0

    @property
    def address(self) -> str:
        return str(self.data.parent)

    @contextmanager
    def send(self, key: Key) -> Iterator[Parcel]:
        with CacheEntry(self.data).open(key) as found:
            if found is None:
                raise PeerError("it is not there")
            self.sent += 1
            yield Parcel(found[1], self.spoil(self._pieces()))

    def _pieces(self) -> Iterator[Piece]:
        content = np.fromfile(self.data, dtype=np.uint8)
        for start in range(0, len(content), PIECE):
            yield content[start : start + PIECE]


@dataclass
class FakePeers:
    found: list[DiskPeer]
    announced: list[Path] = field(default_factory=list)

    def origin(self, checkpoint: Path) -> Origin:
        return Origin.at(checkpoint)

    def holding(self, name: str) -> Iterator[DiskPeer]:
        assert name == "m"
        yield from self.found

    def announce(self, data: Path) -> None:
        self.announced.append(data)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Another node's file."""
    WeightCache(tmp_path / "other", NO_LIMIT).load("m", KEY, Maker())
    return tmp_path / "other" / "m.safetensors"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def no_checkpoint() -> Iterator[tuple[str, Packed]]:
    raise CheckpointError("not on this node")


def load(directory: Path, *peers: DiskPeer) -> FakePeers:
    """On a node without a checkpoint."""
    among = FakePeers(list(peers))
    found = WeightCache(directory, NO_LIMIT, among).load("m", KEY, no_checkpoint)
    for name, value in values().items():
        assert_equal(found[name], value)
    return among


def test_a_file_comes_from_a_peer_once(packed: Path, directory: Path) -> None:
    peer = DiskPeer(packed)
    peers = load(directory, peer)
    assert peers.announced == [directory / "m.safetensors"]
    assert (directory / "m.safetensors").read_bytes() == packed.read_bytes()
    assert load(directory).announced == [directory / "m.safetensors"]
    assert peer.sent == 1
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["m.json", "m.lock", "m.safetensors"]


def flipped(pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield next(pieces)
    last = next(pieces).copy()
    last[-1] ^= 1
    yield last
    yield from pieces


def cut_short(pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield next(pieces)


def without_end(pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield from pieces
    for _ in range(100):
        yield np.zeros(PIECE, dtype=np.uint8)
    raise AssertionError("nobody needs so much of it")


def dying(pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield next(pieces)
    raise PeerError("WorkerCrashedError: the worker died")


@pytest.mark.parametrize("spoil", [flipped, cut_short, without_end, dying])
def test_another_peer_gives_what_one_spoils(
    spoil: Callable[[Iterator[Piece]], Iterator[Piece]],
    packed: Path,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoiling, other = DiskPeer(packed, spoil), DiskPeer(packed)
    load(directory, spoiling, other)
    assert (spoiling.sent, other.sent) == (1, 1)
    (record,) = caplog.records
    assert f"m does not come from {packed.parent}: " in record.getMessage()


@pytest.mark.parametrize("spoil", [flipped, cut_short, without_end, dying])
def test_the_checkpoint_gives_what_every_peer_spoils(
    spoil: Callable[[Iterator[Piece]], Iterator[Piece]], packed: Path, directory: Path
) -> None:
    make = Maker()
    WeightCache(directory, NO_LIMIT, FakePeers([DiskPeer(packed, spoil)])).load("m", KEY, make)
    assert make.calls == 1
    load(directory)


def test_without_peer_and_checkpoint_the_reason_is_raised(packed: Path, directory: Path) -> None:
    packed.unlink()
    with pytest.raises(CheckpointError, match="not on this node"):
        load(directory, DiskPeer(packed))
    assert [path.suffix for path in directory.iterdir()] == [".lock"]


def test_a_peer_s_file_of_another_key_is_not_taken(packed: Path, directory: Path) -> None:
    make = Maker(seed=1)
    peers = FakePeers([DiskPeer(packed)])
    found = WeightCache(directory, NO_LIMIT, peers).load("m", KEY | {"files": []}, make)
    assert_equal(found["table"], values(1)["table"])


def test_a_full_disk_costs_a_private_copy(
    packed: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    peer = DiskPeer(packed)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert load(directory, peer).announced == []
    assert peer.sent == 2  # the second into memory
    assert "No space left" in caplog.text
    assert [path.suffix for path in directory.iterdir()] == [".lock"]


def test_neither_disk_nor_memory_for_what_peers_have(
    packed: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The checkpoint is read, as without peers."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "memfd_create", full)
    peer, make = DiskPeer(packed), Maker()
    found = WeightCache(directory, NO_LIMIT, FakePeers([peer])).load("m", KEY, make)
    assert_equal(found["table"], values()["table"])
    assert (peer.sent, make.calls) == (2, 1)
    assert "m does not come from other nodes: [Errno 28]" in caplog.text


def test_a_large_file_is_synced_as_it_grows(
    packed: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who wait for its maker see it move."""
    sizes: list[int] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(cache_entry, "SYNC_BYTES", PIECE)
    load(directory, DiskPeer(packed))
    assert sizes[:2] == [PIECE, 2 * PIECE]


def _join(directory: Path, packed: Path, notes: Path, both_wait: Barrier) -> None:
    def note(pieces: Iterator[Piece]) -> Iterator[Piece]:
        with (notes / "sent").open("a") as file:
            file.write("x")
        yield from pieces

    # Both have looked for the file, and found none, before either takes its lock.
    def create_together(directory: Path) -> None:
        create_own(directory)
        both_wait.wait(DEADLINE_S)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.weights.cache.create_own", create_together)
        load(directory, DiskPeer(packed, note))


def test_two_that_join_fetch_once(packed: Path, directory: Path, tmp_path: Path) -> None:
    both_wait = spawn().Barrier(2)
    processes = [
        spawn().Process(target=_join, args=(directory, packed, tmp_path, both_wait))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_S)
        assert process.exitcode == 0
    assert (tmp_path / "sent").read_text() == "x"


def test_a_manifest_s_key_is_what_was_asked_for(packed: Path) -> None:
    with CacheEntry(packed).open(KEY) as found:
        assert found is not None
        manifest = Manifest(**json.loads(packed.with_suffix(".json").read_text()))
        assert found[1] == manifest
        assert replace(manifest, size=manifest.size + 1) != manifest


class Held:
    """An entry whose lock a process holds that does nothing, or writes."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.entry = CacheEntry(directory / "m.safetensors")
        self.notes = directory
        self.process = spawn().Process(target=_hold, args=(self.entry,))
        self.process.start()
        wait_for(self.entry.unfinished)


def _hold(entry: CacheEntry) -> None:
    with entry.locked(wait=True):
        entry.unfinished.touch()
        wait_for(entry.data.with_suffix(".end"))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def held(directory: Path) -> Iterator[Held]:
    held = Held(directory)
    yield held
    held.process.kill()
    held.process.join()


def test_a_stalled_maker_is_named_and_not_waited_for(
    held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_entry, "NAME_HOLDER_AFTER_S", 0.05)
    monkeypatch.setattr(cache_entry, "STALLED_AFTER_S", 0.3)
    make = Maker()
    with caplog.at_level(logging.WARNING):
        found = WeightCache(held.notes, NO_LIMIT).load("m", KEY, make)
    assert_equal(found["table"], values()["table"])
    assert make.calls == 1  # into private memory
    waiting, given_up = (record.getMessage() for record in caplog.records)
    holder = f"process {held.process.pid} on "
    assert f"waiting for {holder}" in waiting
    assert holder in given_up
    assert "has written nothing for" in given_up


def write_more(entry: CacheEntry) -> None:
    with entry.unfinished.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("work", [write_more, CacheEntry.touch_unfinished])
def test_a_maker_that_works_is_waited_for(
    work: Callable[[CacheEntry], None],
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However long it takes: the file grows, or is touched, while the waiting process looks."""
    monkeypatch.setattr(cache_entry, "STALLED_AFTER_S", 0.3)
    looks = 0

    def look(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 50:
            held.entry.data.with_suffix(".end").touch()
        work(held.entry)
        time_sleep(0.02)

    time_sleep = time.sleep
    monkeypatch.setattr("engine.weights.cache_entry.time.sleep", look)
    make = Maker()
    WeightCache(held.notes, NO_LIMIT).load("m", KEY, make)
    assert make.calls == 1
    assert looks >= 50
    assert caplog.records == []
