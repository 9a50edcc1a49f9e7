"""Starts of engines on a second node of the cluster, which has no checkpoint."""

import asyncio
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.engine_memory import engine_pids
from benchmarks.record import Table
from benchmarks.weight_loads import summary
from engine.config import EngineConfig

ANNOUNCED_S = 0.2  # an engine tells the cluster of its file in the background


async def second_node(
    model: Path, none: EngineConfig, config: EngineConfig, home: Path, runs: int
) -> Table:
    """`none` is the config of an engine without weights to speak of, `home` the node's caches.

    A link stands for the checkpoint: it is gone when the second node's engines start.
    """
    import ray

    link = model.with_name("link")
    link.symlink_to(model)
    first = ray.get_runtime_context().get_node_id()
    (second,) = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != first]  # type: ignore[no-untyped-call]
    config = replace(config, model=str(link))
    await _start_on(first, config)  # announces its file
    link.unlink()
    await _start_on(second, none)  # Ray's first worker there
    names = [
        "no weights to speak of",
        "joins: takes the weights from the first node, has no checkpoint",
        "warm: maps",
    ]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(runs):
        shutil.rmtree(home, ignore_errors=True)
        for name, each in zip(names, (none, config, config), strict=True):
            seconds[name].append(await _start_on(second, each))
    return Table(
        title="From actor start to ready on a second node, s",
        columns=["start", "median", "least", "most"],
        rows=summary(seconds),
        notes=["Two nodes on one machine: loopback, and both share its cores and its disk."],
    )


async def _start_on(node: str, config: EngineConfig) -> float:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from engine.ray_actor import EngineActor

    remote: Any = ray.remote(EngineActor)
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    started = time.perf_counter()
    actor = remote.options(num_cpus=0, scheduling_strategy=affinity).remote(config, 0)
    await actor.start.remote()
    seconds = time.perf_counter() - started
    await asyncio.sleep(ANNOUNCED_S)
    ray.kill(actor)
    while engine_pids():
        await asyncio.sleep(0.05)
    return seconds
