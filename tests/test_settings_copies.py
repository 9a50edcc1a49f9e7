"""Copies of a checkpoint's settings: whole ones only, nowhere but where they belong."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from engine.errors import ConfigError
from engine.ray_weights import _reason
from engine.weights import settings
from engine.weights.cache import WeightCache
from engine.weights.own_directory import SCRATCH_LEFT_S
from engine.weights.peers import PeerError
from engine.weights.settings import SettingsCopies
from tests.test_weight_cache import KEY, NO_LIMIT, Maker

ID = "0123456789abcdef"
CONTENTS = {"config.json": b"{}", "tokenizer.json": b"[]"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(settings, "MEMORY", tmp_path / "memory")
    return tmp_path / "memory"


@pytest.fixture
def copies(cache: Path, memory: Path) -> SettingsCopies:
    return SettingsCopies(cache)


def test_what_is_kept_is_found(copies: SettingsCopies, cache: Path, memory: Path) -> None:
    assert copies.find("/models/m", ID) is None
    for _ in range(2):  # two engines that come together bring them twice
        path = copies.keep("/models/m", ID, CONTENTS)
    assert path == cache / f"m-{ID}.settings"
    assert copies.find("/models/m", ID) == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == CONTENTS
    assert list(cache.iterdir()) == [path]
    assert not memory.exists()


def test_a_full_disk_s_settings_are_kept_in_memory(
    copies: SettingsCopies,
    cache: Path,
    memory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill(cache, monkeypatch)
    path = copies.keep("/models/m", ID, CONTENTS)
    assert path.is_relative_to(memory)
    assert (path / "config.json").read_bytes() == b"{}"
    assert copies.find("/models/m", ID) == path
    assert "No space left" in caplog.text
    assert list(cache.iterdir()) == []


def test_the_reason_when_nothing_takes_them(
    copies: SettingsCopies, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache.parent, monkeypatch)
    with pytest.raises(ConfigError, match=f"weights_cache {cache}.* free space"):
        copies.keep("/models/m", ID, CONTENTS)


def fill(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def write_if_room(path: Path, content: bytes) -> int:
        if path.is_relative_to(disk):
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_if_room)


@pytest.mark.parametrize(
    "name", ["../escaped.json", "/escaped.json", "..", "model.py", "a.safetensors.index.json"]
)
def test_only_files_of_settings_are_taken(copies: SettingsCopies, name: str, cache: Path) -> None:
    with pytest.raises(PeerError, match="no file of settings"):
        copies.keep("/models/m", ID, CONTENTS | {name: b"owned"})
    assert not cache.exists()


def test_settings_without_a_config_are_not_taken(copies: SettingsCopies) -> None:
    with pytest.raises(PeerError, match=r"no config\.json"):
        copies.keep("/models/m", ID, {"tokenizer.json": b"[]"})


@pytest.mark.parametrize("settings_id", ["../../../../0123", "", "0123456789ABCDEF", ID + "\n"])
def test_an_id_that_is_none_leads_nowhere(copies: SettingsCopies, settings_id: str) -> None:
    with pytest.raises(PeerError, match="no id of settings"):
        copies.find("/models/m", settings_id)


def test_what_a_killed_process_left_is_deleted_with_what_the_cache_deletes(cache: Path) -> None:
    for name, age in (("unfinished-old", 2 * SCRATCH_LEFT_S), ("unfinished-new", 0)):
        (cache / name / "m.settings").mkdir(parents=True)
        then = time.time() - age
        os.utime(cache / name, (then, then))
    WeightCache(cache, NO_LIMIT).load("m", KEY, Maker())
    assert [path.name for path in cache.glob("unfinished-*")] == ["unfinished-new"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError(), "MemoryError"), (OSError("gone\nsince noon"), "OSError: gone")],
)
def test_a_sender_s_error_in_one_line(error: Exception, reason: str) -> None:
    failed: Any = RayTaskError
    assert _reason(failed("_send_file", "its stack", error)) == reason
