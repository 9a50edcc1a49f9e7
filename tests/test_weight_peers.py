"""WeightCache with peers: whole files only, fetched once, and another source when one fails."""

import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.weights import cache_entry
from engine.weights.cache import WeightCache
from engine.weights.cache_entry import CacheEntry, Key, Manifest
from engine.weights.origin import Origin, settings_files
from engine.weights.packed_file import Packed
from engine.weights.peers import Parcel, PeerError, Piece
from engine.worker import check_same
from tests.test_weight_cache import KEY, NO_LIMIT, Maker, assert_equal, spawn, values

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


def dying(pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield next(pieces)
    raise PeerError("WorkerCrashedError: the worker died")


@pytest.mark.parametrize("spoil", [flipped, cut_short, dying])
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


@pytest.mark.parametrize("spoil", [flipped, cut_short, dying])
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


def _join(directory: Path, packed: Path, notes: Path) -> None:
    def slow(pieces: Iterator[Piece]) -> Iterator[Piece]:
        with (notes / "sent").open("a") as file:
            file.write("x")
        for piece in pieces:
            time.sleep(0.1)
            yield piece

    load(directory, DiskPeer(packed, slow))


def test_two_that_join_fetch_once(packed: Path, directory: Path, tmp_path: Path) -> None:
    processes = [
        spawn().Process(target=_join, args=(directory, packed, tmp_path)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
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
        while not self.entry.unfinished.exists():
            time.sleep(0.01)


def _hold(entry: CacheEntry) -> None:
    with entry.locked(wait=True):
        entry.unfinished.touch()
        while not entry.data.with_suffix(".end").exists():
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


def test_a_maker_that_writes_is_waited_for(
    held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However long it takes: the file grows while the waiting process looks."""
    monkeypatch.setattr(cache_entry, "STALLED_AFTER_S", 0.3)
    looks = 0

    def look(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 50:
            held.entry.data.with_suffix(".end").touch()
        with held.entry.unfinished.open("ab") as file:
            file.write(b"more")
        time_sleep(0.02)

    time_sleep = time.sleep
    monkeypatch.setattr("engine.weights.cache_entry.time.sleep", look)
    make = Maker()
    WeightCache(held.notes, NO_LIMIT).load("m", KEY, make)
    assert make.calls == 1
    assert looks >= 50
    assert caplog.records == []


class Neighbour:
    """A group of two whose other rank gives these values in turn."""

    def __init__(self, *values: int) -> None:
        self._values = list(values)

    def min(self, value: int) -> int:
        return min(value, self._values.pop(0))


def digest(origin: Origin) -> int:
    return zlib.crc32(json.dumps(origin.files).encode())


@pytest.mark.parametrize(
    ("ours_here", "theirs_here", "same", "starts"),
    [
        (True, False, True, True),
        (False, True, True, True),
        (True, False, False, False),
        (False, True, False, False),
        (False, False, False, False),
        (True, True, False, True),  # each read its own; only the times of change differ
    ],
)
def test_ranks_without_a_checkpoint_must_have_the_others_version(
    ours_here: bool, theirs_here: bool, same: bool, starts: bool
) -> None:
    ours = Origin("/model", [["model.safetensors", 10, 20]], Path("/model"), "id", "", ours_here)
    theirs = digest(ours) if same else digest(ours) + 1
    group = Neighbour(theirs_here, theirs, -theirs)
    if starts:
        check_same(ours, group)  # type: ignore[arg-type]
    else:
        with pytest.raises(CheckpointError, match="different versions of /model"):
            check_same(ours, group)  # type: ignore[arg-type]


def test_an_index_alone_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").touch()
    (tmp_path / "config.json").touch()
    assert not Origin.at(tmp_path).has_weights
    assert [path.name for path in settings_files(tmp_path)] == ["config.json"]
    before = Origin.at(tmp_path)
    (tmp_path / "model-00001-of-00001.safetensors").touch()
    after = Origin.at(tmp_path)
    assert after.has_weights
    assert before.settings_id == after.settings_id
