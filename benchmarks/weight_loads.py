"""What of an engine's start is loading weights, measured in this process."""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.engine_memory import read
from benchmarks.record import Table
from engine.models import load_decoder, load_spec
from engine.parallel import ParallelGroup
from engine.weights.cache import WeightCache


def loads(model: Path, packed: Path, runs: int) -> Table:
    """What of a start is weights, in this process."""
    spec, checkpoint = load_spec(model), model / "model.safetensors"

    def decoder(cache: WeightCache | None) -> object:
        return load_decoder(
            model,
            spec,
            dtype=torch.bfloat16,
            device="cpu",
            group=ParallelGroup(),
            session_len=512,
            cache=cache,
        )

    cache = WeightCache(packed, 1 << 40)
    kinds: dict[str, Callable[[], object]] = {
        "safetensors' own load_file of the checkpoint": lambda: load_file(checkpoint),
        "checkpoint read, cut and packed": lambda: decoder(None),
        "the same, written to disk and mapped": lambda: decoder(cache),
        "mapped": lambda: decoder(cache),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for _ in range(runs):
        read(checkpoint)
        shutil.rmtree(packed, ignore_errors=True)
        for name, load in kinds.items():
            started = time.perf_counter()
            load()
            seconds[name].append(time.perf_counter() - started)
    return Table(
        title="Loading weights in a running process, checkpoint in the page cache, s",
        columns=["load", "median", "least", "most"],
        rows=summary(seconds),
        notes=[f"{torch.get_num_threads()} threads; load_file maps too, and packs nothing."],
    )


def summary(seconds: dict[str, list[float]]) -> list[list[str | float]]:
    return [[name, statistics.median(each), min(each), max(each)] for name, each in seconds.items()]
