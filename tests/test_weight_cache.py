"""WeightCache: whole files only, made once, remade when damaged, evicted when unused."""

import json
import logging
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.weights.cache import WeightCache
from engine.weights.packed_file import ALIGNMENT, HEADER_ROOM, Packed
from kernels.dense_linear import DenseWeight

KEY = {"checkpoint": "model", "files": [["model.safetensors", 10, 20]]}
NO_LIMIT = 1 << 40
DEADLINE_S = 60  # for processes that take a second


def values(seed: int = 0) -> dict[str, Packed]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "norm": torch.randn(7, generator=generator),  # 28 bytes: the next one needs padding
        "ids": torch.arange(5),
        "table": torch.randn(6, 9, generator=generator).bfloat16(),
        "linear": DenseWeight(torch.randn(4, 3, generator=generator), reordered=False),
    }


class Maker:
    """Gives `values` and counts how often."""

    def __init__(self, seed: int = 0) -> None:
        self.calls = 0
        self._seed = seed

    def __call__(self) -> Iterator[tuple[str, Packed]]:
        self.calls += 1
        yield from values(self._seed).items()


def assert_equal(found: object, expected: object) -> None:
    if isinstance(found, DenseWeight):
        assert isinstance(expected, DenseWeight)
        found, expected = found.data, expected.data
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def load(directory: Path, make: Maker, name: str = "m", max_bytes: int = NO_LIMIT) -> None:
    """Load and compare."""
    found = WeightCache(directory, max_bytes).load(name, KEY, make)
    expected = dict(Maker(make._seed)())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_equal(found[key], value)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_second_engine_makes_nothing(directory: Path) -> None:
    make = Maker()
    load(directory, make)
    load(directory, make)
    assert make.calls == 1


def test_files_are_private_aligned_safetensors(directory: Path) -> None:
    load(directory, Maker())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    path = directory / "m.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tensors = load_file(path)  # the format's own reader
    assert torch.equal(tensors["table"], values()["table"])  # type: ignore[arg-type]
    header = json.loads(path.read_bytes()[8:HEADER_ROOM])
    starts = [entry["data_offsets"][0] for name, entry in header.items() if name[0] not in "_~"]
    assert len(starts) == 4
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert sorted(each.suffix for each in directory.iterdir()) == [".json", ".lock", ".safetensors"]


def test_another_key_under_the_same_name_is_made_again(directory: Path) -> None:
    load(directory, Maker())
    make = Maker(seed=1)
    found = WeightCache(directory, NO_LIMIT).load("m", KEY | {"files": []}, make)
    assert_equal(found["table"], values(1)["table"])
    assert make.calls == 1


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(HEADER_ROOM + 3)
        file.write(b"\x55")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_manifest(path: Path) -> None:
    path.with_suffix(".json").write_text('{"key": 3')


def lose_manifest(path: Path) -> None:
    path.with_suffix(".json").unlink()


def lose_data(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "damage", [flip, truncate, empty, spoil_manifest, lose_manifest, lose_data]
)
def test_damage_is_found_and_mended(
    damage: Callable[[Path], None], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = Maker()
    load(directory, make)
    time.sleep(0.02)  # a file's times move in steps of a few milliseconds
    damage(directory / "m.safetensors")
    load(directory, make)
    load(directory, make)
    assert make.calls == 2
    assert len(caplog.records) == (damage is not lose_data)


def test_a_copied_directory_is_good(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other times of change: the sum decides, once."""
    load(directory, Maker())
    copied = tmp_path / "copied"
    copied.mkdir(mode=0o700)
    for path in directory.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    make = Maker()
    load(copied, make)

    def no_sum(*_: object) -> int:
        raise AssertionError("the manifest was renewed")

    monkeypatch.setattr("engine.weights.cache_entry.crc32_of", no_sum)
    load(copied, make)
    assert make.calls == 0


def test_values_outlive_their_file(directory: Path) -> None:
    """Truncating or unlinking by a remake must not take pages from under an engine."""
    found = WeightCache(directory, NO_LIMIT).load("m", KEY, Maker())
    lose_manifest(directory / "m.safetensors")
    load(directory, Maker())
    assert_equal(found["table"], values()["table"])


def spawn() -> SpawnContext:
    return multiprocessing.get_context("spawn")


def _write_to_mapping(directory: Path) -> None:
    found = WeightCache(directory, NO_LIMIT).load("m", KEY, Maker())
    table = found["table"]
    assert isinstance(table, Tensor)
    table.zero_()


def test_the_mapping_is_read_only(directory: Path) -> None:
    load(directory, Maker())
    process = spawn().Process(target=_write_to_mapping, args=(directory,))
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == -signal.SIGSEGV
    make = Maker()
    load(directory, make)
    assert make.calls == 0


class SlowMaker(Maker):
    """Stays half done until it is let go on; notes that it began."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self._notes = notes

    def __call__(self) -> Iterator[tuple[str, Packed]]:
        with (self._notes / "begun").open("a") as file:
            file.write(f"{os.getpid()}\n")
        items = list(values().items())
        yield items[0]
        deadline = time.monotonic() + DEADLINE_S
        while not (self._notes / "go on").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield from items[1:]


def _load_slowly(directory: Path, notes: Path) -> None:
    load(directory, SlowMaker(notes))


def start_slow(directory: Path, notes: Path, count: int) -> list[BaseProcess]:
    processes: list[BaseProcess] = [
        spawn().Process(target=_load_slowly, args=(directory, notes)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def begun(notes: Path) -> list[str]:
    path = notes / "begun"
    return path.read_text().splitlines() if path.exists() else []


def wait_until_begun(notes: Path, processes: list[BaseProcess]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not begun(notes):
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


def test_one_makes_and_the_others_wait(directory: Path, tmp_path: Path) -> None:
    processes = start_slow(directory, tmp_path, 3)
    wait_until_begun(tmp_path, processes)
    (tmp_path / "go on").touch()
    for process in processes:
        process.join(DEADLINE_S)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(begun(tmp_path)) == 1


def test_a_killed_maker_leaves_nothing_that_is_mapped(directory: Path, tmp_path: Path) -> None:
    """Its lock dies with it: a process that waits for it makes the file."""
    (first,) = start_slow(directory, tmp_path, 1)
    wait_until_begun(tmp_path, [first])
    assert (directory / "m.tmp").exists()
    assert not (directory / "m.safetensors").exists()
    (second,) = start_slow(directory, tmp_path, 1)
    first.kill()
    first.join()
    (tmp_path / "go on").touch()
    second.join(DEADLINE_S)
    assert second.exitcode == 0
    assert len(begun(tmp_path)) == 2
    assert not (directory / "m.tmp").exists()
    make = Maker()
    load(directory, make)
    assert make.calls == 0


def test_what_a_killed_maker_left_is_deleted(directory: Path, tmp_path: Path) -> None:
    (first,) = start_slow(directory, tmp_path, 1)
    wait_until_begun(tmp_path, [first])
    first.kill()
    first.join()
    load(directory, Maker(), name="other")
    assert not (directory / "m.tmp").exists()


def test_an_error_while_making_is_the_makers(directory: Path) -> None:
    def make() -> Iterator[tuple[str, Packed]]:
        yield "norm", torch.ones(3)
        raise CheckpointError("cut short")

    with pytest.raises(CheckpointError, match="cut short"):
        WeightCache(directory, NO_LIMIT).load("m", KEY, make)
    assert [path.suffix for path in directory.iterdir()] == [".lock"]


def test_a_full_disk_costs_a_warning(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    make = Maker()
    with caplog.at_level(logging.WARNING):
        load(directory, make)
    assert make.calls == 2  # the second into private memory
    (record,) = caplog.records
    assert "No space left" in record.getMessage()
    assert f"{directory}" in record.getMessage()
    assert "weights_cache" in record.getMessage()
    assert [path.suffix for path in directory.iterdir()] == [".lock"]


def test_a_full_disk_loses_what_nobody_uses(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_use = WeightCache(directory, NO_LIMIT).load("in use", KEY, Maker())
    load(directory, Maker(), name="old")
    fsync = os.fsync

    def sync_if_room(descriptor: int) -> None:
        if (directory / "old.safetensors").exists():
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_if_room)
    make = Maker()
    load(directory, make)
    assert make.calls == 2
    assert {path.stem for path in directory.glob("*.safetensors")} == {"in use", "m"}
    assert_equal(in_use["table"], values()["table"])
    (record,) = caplog.records
    assert "No space left" in record.getMessage()
    load(directory, make)
    assert make.calls == 2


def test_a_directory_that_cannot_be_made_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    load(tmp_path / "file" / "cache", Maker())
    assert "Not a directory" in caplog.text


def test_a_read_only_directory_serves_what_it_has(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(directory, Maker())
    plain_open = Path.open

    def open_to_read(path: Path, mode: str = "r", **options: object) -> object:
        if mode not in ("r", "rb"):
            raise OSError(30, "Read-only file system", str(path))
        return plain_open(path, mode, **options)  # type: ignore[call-overload]

    def refuse(path: Path, **options: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", open_to_read)
    monkeypatch.setattr(os, "utime", refuse)
    make = Maker()
    load(directory, make)
    assert make.calls == 0
    assert caplog.records == []
    load(directory, make, name="other")
    assert "Read-only file system" in caplog.text
    assert make.calls == 1


def test_the_oldest_unused_file_goes_first(directory: Path) -> None:
    size = HEADER_ROOM * 2 + HEADER_ROOM // 2  # room for two
    in_use = WeightCache(directory, size).load("in use", KEY, Maker())
    for age, name in ((300, "in use"), (200, "old"), (100, "new")):
        load(directory, Maker(), name=name)
        then = time.time() - age
        os.utime(directory / f"{name}.json", (then, then))
    load(directory, Maker(), name="old")  # used again: now younger than "new"
    load(directory, Maker(), name="newest", max_bytes=size)
    assert {path.stem for path in directory.glob("*.safetensors")} == {"in use", "newest"}
    assert_equal(in_use["table"], values()["table"])
    del in_use
    load(directory, Maker(), name="last", max_bytes=size)
    assert {path.stem for path in directory.glob("*.safetensors")} == {"newest", "last"}
    assert {path.suffix for path in directory.glob("in use*")} == set()


def test_a_foreign_directory_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir(mode=0o700)
    owner = directory.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match="belongs to user") as caught:
        WeightCache(directory, NO_LIMIT)
    assert str(directory) in str(caught.value)


def test_a_directory_others_may_write_to_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(ConfigError, match=r"mode 777.*chmod 700"):
        WeightCache(directory, NO_LIMIT)
