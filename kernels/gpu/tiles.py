"""Tuned tiles as data: what was measured to be fastest, by GPU, kernel and shape.

configs/kernels/<gpu>.json, written by `python -m benchmarks.gpu tune` on that GPU:

    {
      "gpu": "nvidia-h200",             the name of the file, and of the device in this spelling
      "triton": "3.6.0",                what compiled the kernels
      "kernels": {
        "w4a16": [                      a module of kernels/gpu, or one's form: w4a16_gated
          {"key": {"m": 16, "n": 4096, "k": 4096}, "tile": {"block_n": 128, "num_warps": 4}}
        ]
      }
    }

Keys and tiles are integers and strings by name (a tile's also null, its launcher's choice). What
they mean is the launcher's: sizes that vary from step to step are rounded to buckets there. A
shape without an entry, and a GPU without a file, take the launcher's default.

A module with tuned tiles also has
    candidates(kernel, **key) -> list[Tile]             what `tune` tries for a key
    tile_case(kernel, key, tile) -> CompileCase         so that every tile of a file is compiled
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.gpu import has_gpu

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "kernels"

Tile = dict[str, Any]
Key = dict[str, int | str]
_Table = dict[tuple[tuple[str, int | str], ...], Tile]

_trials: dict[str, tuple[Tile | None, list[Key]]] = {}


def lookup(kernel: str, **key: int | str) -> Tile | None:
    """The tuned tile; None: the launcher's default. The dictionary is shared: read it only."""
    if kernel in _trials:
        tile, asked = _trials[kernel]
        asked.append(key)
        return tile
    assert module_of(kernel), f"kernels/gpu has no module for {kernel!r}"
    gpu = gpu_name()
    if gpu is None:
        return None
    table = tables(_path(FOLDER, gpu)).get(kernel)
    if not table:
        return None
    names = tuple(sorted(key.items()))
    if (tile := table.get(names)) is None:
        _check_names(f"{FOLDER / gpu}.json: {kernel}", next(iter(table)), names)
    return tile


@contextmanager
def trial(kernel: str, tile: Tile | None) -> Iterator[list[Key]]:
    """Within it lookups of `kernel` answer `tile`; gives the list of the keys they asked for."""
    asked: list[Key] = []
    _trials[kernel] = tile, asked
    try:
        yield asked
    finally:
        del _trials[kernel]


@cache
def gpu_name() -> str | None:
    """This process's GPU as files spell it, `nvidia-h200`; None without one."""
    if not has_gpu():
        return None
    return spelled(torch.cuda.get_device_name())


def spelled(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@cache  # every eager launch asks, and to make and hash a path takes longer than the rest
def _path(folder: Path, gpu: str) -> Path:
    return folder / f"{gpu}.json"


@cache
def tables(path: Path) -> dict[str, _Table]:
    """Tiles by kernel and sorted key. Raises ValueError: the file's name and its fault."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    _check(isinstance(content, dict), f"{path}: not an object")
    _check(
        content.keys() == {"gpu", "triton", "kernels"},
        f"{path}: its fields are {sorted(content)}, not gpu, kernels and triton",
    )
    _check(
        content["gpu"] == path.stem,
        f"{path}: gpu is {content['gpu']!r}, and the file is for {path.stem!r}",
    )
    _check(isinstance(content["kernels"], dict), f"{path}: kernels is not an object")
    return {
        kernel: _table(f"{path}: {kernel}", kernel, entries)
        for kernel, entries in content["kernels"].items()
    }


def _table(where: str, kernel: str, entries: Any) -> _Table:
    _check(module_of(kernel) is not None, f"{where}: kernels/gpu has no such module")
    _check(isinstance(entries, list), f"{where}: not a list")
    table: _Table = {}
    for index, entry in enumerate(entries):
        place = f"{where}[{index}]"
        _check(
            isinstance(entry, dict) and entry.keys() == {"key", "tile"},
            f"{place}: not an object of key and tile",
        )
        key, tile = entry["key"], entry["tile"]
        _check(
            isinstance(key, dict) and all(isinstance(v, int | str) for v in key.values()),
            f"{place}: the key is {key}, not integers and strings by name",
        )
        _check(
            isinstance(tile, dict)
            and all(v is None or isinstance(v, int | str) for v in tile.values()),
            f"{place}: the tile is {tile}, not integers and strings by name",
        )
        names = tuple(sorted(key.items()))
        _check(names not in table, f"{place}: {key} is there twice")
        if table:
            first_key, first_tile = next(iter(table.items()))
            _check_names(place, first_key, names)
            _check(
                tile.keys() == first_tile.keys(),
                f"{place}: the tile has {sorted(tile)}, others have {sorted(first_tile)}",
            )
        table[names] = tile
    return table


def _check_names(
    where: str, has: tuple[tuple[str, int | str], ...], asked: tuple[tuple[str, int | str], ...]
) -> None:
    """A key with other names than the file's would silently find nothing."""
    names, others = [name for name, _ in has], [name for name, _ in asked]
    _check(names == others, f"{where}: keys of {names} and of {others}; tune it anew")


def _check(right: bool, fault: str) -> None:
    if not right:
        raise ValueError(fault)


@cache
def module_of(kernel: str) -> str | None:
    """Of kernels/gpu: the one of that name, or the longest whose form the name is."""
    modules = [path.stem for path in Path(__file__).parent.glob("*.py")]
    found = [name for name in modules if kernel == name or kernel.startswith(f"{name}_")]
    return max(found, key=len, default=None)
