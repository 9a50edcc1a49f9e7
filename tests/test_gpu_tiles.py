"""Tuned tiles are found by GPU, kernel and key, and a wrong file is named with its fault."""

import json
from pathlib import Path
from typing import Any

import pytest

from kernels.gpu import tiles

KERNEL = "step"  # any module of kernels/gpu
KEY = {"m": 16, "n": 4096}
TILE = {"block_n": 128, "num_warps": 4}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, whose file is the one in tmp_path."""
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    monkeypatch.setattr(tiles, "gpu_name", lambda: "nvidia-h200")
    return "nvidia-h200"


def _write(name: str, **changes: Any) -> Path:
    entries = [{"key": KEY, "tile": TILE}, {"key": KEY | {"m": 32}, "tile": TILE | {"block_n": 64}}]
    content = {"gpu": name, "triton": "3.6.0", "kernels": {KERNEL: entries}} | changes
    path = tiles.FOLDER / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def test_a_tile_is_found_by_its_key_in_any_order(gpu: str) -> None:
    _write(gpu)
    assert tiles.lookup(KERNEL, m=16, n=4096) == TILE
    assert tiles.lookup(KERNEL, n=4096, m=32) == TILE | {"block_n": 64}


def test_a_module_has_several_kernels(gpu: str) -> None:
    _write(gpu, kernels={f"{KERNEL}_gated": [{"key": KEY, "tile": TILE}]})
    assert tiles.module_of(f"{KERNEL}_gated") == KERNEL
    assert tiles.lookup(f"{KERNEL}_gated", **KEY) == TILE
    assert tiles.lookup(KERNEL, **KEY) is None


def test_what_was_not_measured_takes_the_default(gpu: str) -> None:
    assert tiles.lookup(KERNEL, m=16, n=4096) is None
    tiles.tables.cache_clear()
    _write(gpu)
    assert tiles.lookup(KERNEL, m=64, n=4096) is None
    assert tiles.lookup("tiles", m=16) is None


def test_there_is_no_tile_without_a_gpu() -> None:
    if tiles.gpu_name() is None:
        assert tiles.lookup(KERNEL, m=16, n=4096) is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"gpu": "nvidia-a100"}, "gpu is 'nvidia-a100', and the file is for 'nvidia-h200'"),
        ({"tiles": []}, "its fields are"),
        ({"kernels": {"w5a16": []}}, "w5a16: kernels/gpu has no such module"),
        ({"kernels": {KERNEL: {}}}, "not a list"),
        ({"kernels": {KERNEL: [{"key": KEY}]}}, "not an object of key and tile"),
        ({"kernels": {KERNEL: [{"key": {"m": 1.5}, "tile": {}}]}}, "the key is"),
        ({"kernels": {KERNEL: [{"key": KEY, "tile": {"block_n": [128]}}]}}, "the tile is"),
        ({"kernels": {KERNEL: [{"key": KEY, "tile": TILE}] * 2}}, "is there twice"),
        (
            {"kernels": {KERNEL: [{"key": KEY, "tile": TILE}, {"key": {"m": 1}, "tile": TILE}]}},
            r"keys of \['m', 'n'\] and of \['m'\]",
        ),
        (
            {
                "kernels": {
                    KERNEL: [{"key": KEY, "tile": TILE}, {"key": KEY | {"m": 1}, "tile": {}}]
                }
            },
            "the tile has",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(
    gpu: str, changes: dict[str, Any], fault: str
) -> None:
    path = _write(gpu, **changes)
    with pytest.raises(ValueError, match=fault) as raised:
        tiles.lookup(KERNEL, **KEY)
    assert str(path) in str(raised.value)


def test_a_file_with_other_keys_than_the_launchers_is_not_passed_over(gpu: str) -> None:
    _write(gpu)
    with pytest.raises(ValueError, match="tune it anew"):
        tiles.lookup(KERNEL, m=16, n=4096, group_size=128)


def test_a_trial_answers_with_its_tile_and_collects_keys(gpu: str) -> None:
    _write(gpu)
    with tiles.trial(KERNEL, {"block_n": 256}) as asked:
        assert tiles.lookup(KERNEL, m=16, n=4096) == {"block_n": 256}
    assert asked == [KEY]
    assert tiles.lookup(KERNEL, m=16, n=4096) == TILE


def test_names_of_devices_become_names_of_files() -> None:
    assert tiles.spelled("NVIDIA H200") == "nvidia-h200"
    assert tiles.spelled("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


def test_shipped_files_are_right() -> None:
    for path in tiles.FOLDER.glob("*.json"):
        assert tiles.tables(path), path
