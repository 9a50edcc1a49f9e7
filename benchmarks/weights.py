"""Engines of one node that share their packed weights, against engines that each load their own.

    python -m benchmarks.weights [--quick] [--runs 3] [--directory DIR]

Engine actors of a local Ray cluster serve a random AWQ checkpoint of 1.1 GB. Memory is PSS, which
divides a shared page by its users, after each engine has answered a prompt and so touched every
weight. Start is the time from asking Ray for the actor until it would take a request.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cpu_engine import QUICK_SHAPE
from benchmarks.random_checkpoint import LlamaShape, write_awq
from benchmarks.record import Table, save, show
from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest

if TYPE_CHECKING:
    from engine.ray_group import EngineGroup

SHAPE = LlamaShape(
    hidden_size=2048, intermediate_size=5632, num_layers=36, num_heads=32, num_kv_heads=4,
)  # fmt: skip
TINY_SHAPE = LlamaShape(
    hidden_size=256, intermediate_size=256, num_layers=1, num_heads=4, num_kv_heads=4,
    vocab_size=256,
)  # fmt: skip
MOST_ENGINES = 3
PROMPT_TOKENS = 64
DECODE_STEPS = 32
GOAL_COPIES = 1.3
RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's processes listen on 127.0.0.1
    "RAY_worker_niceness": "0",  # as under `manta serve`
}


@dataclass(frozen=True, slots=True)
class Paths:
    model: Path
    tiny: Path  # its engine is what an engine takes without weights
    cache: Path

    def packed(self) -> Path:
        (path,) = self.cache.glob(f"{self.model.name}-*.safetensors")
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure engines that share packed weights.")
    parser.add_argument("--quick", action="store_true", help="a tiny model once, nothing saved")
    parser.add_argument("--runs", type=int, default=3, help="starts of each kind")
    parser.add_argument("--directory", type=Path, help="where to write the files and keep them")
    arguments = parser.parse_args()
    for name, value in RAY.items():  # read when ray is imported
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.directory or Path(scratch)
        shape = QUICK_SHAPE if arguments.quick else SHAPE
        paths = Paths(
            write_awq(directory / "random", shape),
            write_awq(directory / "tiny", TINY_SHAPE),
            directory / "packed",
        )
        tables = asyncio.run(_measure(paths, 1 if arguments.quick else arguments.runs))
    for table in tables:
        show(table)
    if not arguments.quick:
        print(save("weights", "Weights shared by the engines of a node", tables))


async def _measure(paths: Paths, runs: int) -> list[Table]:
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=MOST_ENGINES)
    try:
        return [await _starts(paths, runs), await _memory(paths), await _steps(paths, runs)]
    finally:
        ray.shutdown()


async def _starts(paths: Paths, runs: int) -> Table:
    """All kinds of start in turns."""
    shared, private = _config(paths.model, paths.cache), _config(paths.model, None)
    names = [
        "no weights to speak of",
        "own copy, checkpoint in the page cache",
        "first on the node: packs and writes",
        "warm node: maps",
        "warm node, file on disk only",
    ]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    async with _engines(_config(paths.tiny, None), 1):
        pass  # Ray's first worker
    for _ in range(runs):
        shutil.rmtree(paths.cache, ignore_errors=True)
        for name, config in zip(
            names, (_config(paths.tiny, None), private, shared, shared, shared), strict=True
        ):
            _read(paths.model / "model.safetensors")
            if name == names[-1]:
                _forget(paths.packed())
            seconds[name].append(await _start_seconds(config))
    rows: list[list[str | float]] = [
        [name, statistics.median(each), min(each), max(each)] for name, each in seconds.items()
    ]
    size = paths.packed().stat().st_size
    return Table(
        title="From actor start to ready, s",
        columns=["start", "median", "least", "most"],
        rows=rows,
        notes=[
            f"{size / 1e9:.2f} GB packed, {runs} starts of each kind in turns. Each contains "
            "Python's and torch's own start, which is the first row."
        ],
    )


async def _memory(paths: Paths) -> Table:
    """Copies are counted above engines of a tiny model, which share torch's code as well."""
    copy = paths.packed().stat().st_size
    rows: list[list[str | float]] = []
    for num_engines in range(1, MOST_ENGINES + 1):
        without = await _pss(_config(paths.tiny, None), num_engines)
        row: list[str | float] = [num_engines, without / 2**20]
        for cache in (paths.cache, None):
            pss = await _pss(_config(paths.model, cache), num_engines)
            row += [pss / 2**20, f"{(pss - without) / copy:.2f}"]
        rows.append(row)
    return Table(
        title="Memory of all engines, PSS",
        columns=[
            "engines", "without weights, MiB", "shared, MiB", "copies", "own copies, MiB", "copies",
        ],
        rows=rows,
        notes=[
            f"One copy is {copy / 2**20:,.0f} MiB. "
            f"**Goal: at most {GOAL_COPIES} copies for {MOST_ENGINES} engines that share.**"
        ],
    )  # fmt: skip


async def _steps(paths: Paths, runs: int) -> Table:
    """Whether a mapped file is slower to compute on than private memory."""
    milliseconds: dict[str, list[float]] = {"shared": [], "own copy": []}
    for _ in range(runs):
        for name, cache in zip(milliseconds, (paths.cache, None), strict=True):
            async with _engines(_config(paths.model, cache), 1) as (group,):
                await _answer(group)
                whole = await _answer(group, 1 + DECODE_STEPS)
                milliseconds[name].append((whole - await _answer(group)) / DECODE_STEPS * 1e3)
    return Table(
        title="Decode, 1 stream, ms per step",
        columns=["weights", "median", "least", "most"],
        rows=[
            [name, statistics.median(each), min(each), max(each)]
            for name, each in milliseconds.items()
        ],
    )


def _config(model: Path, cache: Path | None) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        device="cpu",
        dtype="bfloat16",
        session_len=512,
        cache_max_entry_count=64,  # blocks: the KV cache is not what is measured
        weights_cache=None if cache is None else str(cache),
    )


async def _start_seconds(config: EngineConfig) -> float:
    started = time.perf_counter()
    async with _engines(config, 1):
        return time.perf_counter() - started


@asynccontextmanager
async def _engines(config: EngineConfig, count: int) -> AsyncIterator[list["EngineGroup"]]:
    """Engines started one after the other, gone from memory when this ends."""
    from engine.ray_group import EngineGroup

    groups: list[EngineGroup] = []
    try:
        for _ in range(count):
            groups.append(await EngineGroup.start(config))
        yield groups
    finally:
        for group in groups:
            group.stop()
        while _engine_pids():
            await asyncio.sleep(0.05)


async def _answer(group: "EngineGroup", num_tokens: int = 1) -> float:
    """Seconds of one greedy answer; the prompt is new each time, so that no block is reused."""
    prompt = [3 + time.perf_counter_ns() % 200, *range(4, 3 + PROMPT_TOKENS)]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    started = time.perf_counter()
    await group.submit([EngineRequest(request_id="r", prompt_token_ids=prompt, params=params)])
    while True:
        outputs, _ = await group.poll()
        for output in outputs:
            if output.error is not None:
                raise output.error
            if output.finish_reason is not None:
                return time.perf_counter() - started


async def _pss(config: EngineConfig, num_engines: int) -> int:
    """Bytes of that many engines; a page of n processes counts as 1/n to each."""
    async with _engines(config, num_engines) as groups:
        for group in groups:
            await _answer(group)
        pids = _engine_pids()
        assert len(pids) == num_engines
        return sum(_rollup(pid, "Pss") for pid in pids)


def _rollup(pid: int, name: str) -> int:
    """One number of /proc/PID/smaps_rollup, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _engine_pids() -> list[int]:
    """Actors of this process's own cluster: children of its children, by Ray's process title."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        with suppress(OSError):  # it ended meanwhile
            title = (directory / "cmdline").read_bytes()
            if title.startswith(b"ray::EngineActor") and _parent(_parent(pid)) == os.getpid():
                found.append(pid)
    return found


def _parent(pid: int) -> int:
    """From /proc/PID/stat, in which the name may hold spaces."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _read(path: Path) -> None:
    """Into the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def _forget(path: Path) -> None:
    """Out of the page cache, which a file that nobody maps can leave."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
