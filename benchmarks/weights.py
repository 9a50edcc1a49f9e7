"""Engines that share packed weights, on one node and on a second one, against own copies.

    python -m benchmarks.weights [--quick] [--runs 3] [--directory DIR]

Engine actors of a local Ray cluster serve a random AWQ checkpoint of 1.1 GB. Memory is PSS, which
divides a shared page by its users, after each engine has answered a prompt and so touched every
weight. Start is the time from asking Ray for the actor until it would take a request. The second
node is a second raylet of this machine with a cache of its own, over loopback.
"""

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cpu_engine import QUICK_SHAPE
from benchmarks.engine_memory import engine_pids, forget, pss, read
from benchmarks.random_checkpoint import LlamaShape, write_awq
from benchmarks.record import Table, save, show
from benchmarks.second_node import second_node
from benchmarks.weight_loads import loads, summary
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
STORE_BYTES = 1 << 30
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
    second_home: Path  # of the second node's caches

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
            directory / "first" / "manta",
            directory / "second",
        )
        os.environ["XDG_CACHE_HOME"] = str(paths.cache.parent)
        tables = asyncio.run(_measure(paths, 1 if arguments.quick else arguments.runs))
    for table in tables:
        show(table)
    if not arguments.quick:
        print(save("weights", "Weights shared by the engines of a node", tables))


async def _measure(paths: Paths, runs: int) -> list[Table]:
    import ray
    from ray.cluster_utils import Cluster

    loading = loads(paths.model, paths.cache, runs)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": MOST_ENGINES,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        },
    )
    ray.init(cluster.address, log_to_driver=False)
    try:
        starts = await _starts(paths, runs)
        memory, steps = await _memory(paths), await _steps(paths, runs)
        cluster.add_node(
            env_vars={"XDG_CACHE_HOME": str(paths.second_home)}, object_store_memory=STORE_BYTES
        )
        shared = replace(_config(paths.model, paths.cache), weights_cache="auto")
        return [
            starts,
            await second_node(
                paths.model, _config(paths.tiny, None), shared, paths.second_home, runs
            ),
            loading,
            memory,
            steps,
        ]
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


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
            read(paths.model / "model.safetensors")
            if name == names[-1]:
                forget(paths.packed())
            seconds[name].append(await _start_seconds(config))
    size = paths.packed().stat().st_size
    return Table(
        title="From actor start to ready, s",
        columns=["start", "median", "least", "most"],
        rows=summary(seconds),
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
        rows=summary(milliseconds),
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
        while engine_pids():
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
        pids = engine_pids()
        assert len(pids) == num_engines
        return pss(pids)


if __name__ == "__main__":
    main()
