"""Engines over random weights that exist nowhere but on the device, and runs of them.

An 8B checkpoint would take minutes to write and to read. Here the loader is handed random tensors
of the shapes that a checkpoint would have; all else is the engine as it is.
"""

import gc
import json
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.random_checkpoint import INIT_STD, LlamaShape, model_config
from engine.config import EngineConfig
from engine.engine import Engine
from engine.local_executor import LocalExecutor
from engine.models import load_spec
from engine.models.layout import expected_tensors
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from engine.weights.checkpoint import ALL, ExpectedTensor
from kernels.gpu import has_gpu

NIBBLE_DEVIATION = 4.6  # of uniform 0 … 15
# AWQ's zero points lie around 8: nibbles of 6 and 0 to 3 more.
LEAST_ZEROS, MORE_ZEROS = 0x66666666, 0x33333333

Prompts = list[list[int]]


class RandomCheckpoint:
    """What the loader asks of engine.weights.checkpoint.Checkpoint, made up when it is read."""

    def __init__(self, path: Path) -> None:
        self.tensors: dict[str, ExpectedTensor] = expected_tensors(load_spec(path), head=True)
        self._device = "cuda" if has_gpu() else "cpu"

    def __enter__(self) -> "RandomCheckpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def verify(self, expected: object, harmless: object = (), optional: object = ()) -> None:
        pass

    def read_finite(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        return self.read(name, rows, columns)

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """The whole tensor is drawn and cut, so that it is the same however it is read."""
        shape = self.tensors[name].shape
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        if name.endswith(("qweight", "qzeros")):
            words = torch.randint(-(2**31), 2**31, shape, generator=generator, device=self._device)
            value = words.int()
            if name.endswith("qzeros"):
                value = (value & MORE_ZEROS) + LEAST_ZEROS
        elif name.endswith("scales"):
            value = torch.full(shape, INIT_STD / NIBBLE_DEVIATION, device=self._device).half()
        elif len(shape) == 1:
            value = torch.ones(shape, device=self._device, dtype=torch.bfloat16)
        else:
            normal = torch.randn(
                shape, generator=generator, device=self._device, dtype=torch.bfloat16
            )
            value = normal.mul_(INIT_STD)
        return value[rows, columns] if len(shape) == 2 else value[rows]


@contextmanager
def random_engine(shape: LlamaShape, int4: bool, **settings: Any) -> Iterator[Engine]:
    """On the GPU (the interpreter's stand-in for it), without a cache of prefixes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config(shape, int4)))
        with patch("engine.models.loader.Checkpoint", RandomCheckpoint):
            engine = open_engine(Path(folder), enable_prefix_caching=False, **settings)
    try:
        yield engine
    finally:
        engine.close()


def open_engine(checkpoint: Path, **settings: Any) -> Engine:
    """To be closed. The engine before it is freed first, the cycles in it included: the cache takes
    a share of what is free.
    """
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()
    config = EngineConfig(
        model=str(checkpoint), **{"device": "cuda", "weights_cache": None} | settings
    )
    return Engine(config, LocalExecutor(config))


def random_prompts(count: int, length: int, vocab_size: int) -> Prompts:
    prompts: Prompts = torch.randint(3, vocab_size, (count, length)).tolist()
    return prompts


@contextmanager
def requests(engine: Engine, prompts: Prompts, num_tokens: int) -> Iterator[None]:
    """Greedy requests to the last token, named by their index; none is left behind, even by an
    error.
    """
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    try:
        for index, prompt in enumerate(prompts):
            engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
        yield
    finally:
        for index in range(len(prompts)):
            engine.abort(str(index))
        while engine.has_work:
            engine.step()


def generate(engine: Engine, prompts: Prompts, num_tokens: int) -> Prompts:
    tokens: Prompts = [[] for _ in prompts]
    with requests(engine, prompts, num_tokens):
        while engine.has_work:
            _collect(engine, tokens)
    assert all(len(each) == num_tokens for each in tokens)
    return tokens


def _collect(engine: Engine, tokens: Prompts) -> None:
    for output in engine.step():
        if output.error is not None:
            raise output.error
        tokens[int(output.request_id)] += output.token_ids


@dataclass(frozen=True, slots=True)
class Streams:
    """Streams that all decode: their prompts are computed."""

    engine: Engine
    count: int
    prefill_s: float
    num_tokens: int  # of all streams, when the last one's prompt was computed

    def seconds_per_step(self, num_steps: int) -> float:
        started = time.perf_counter()
        num_tokens = sum(
            len(output.token_ids) for _ in range(num_steps) for output in self.engine.step()
        )
        elapsed = time.perf_counter() - started
        assert num_tokens == num_steps * self.count, "a stream ended or waited"
        return elapsed / num_steps


@contextmanager
def decoding(engine: Engine, prompts: Prompts, num_tokens: int) -> Iterator[Streams]:
    """Streams that end with the block."""
    with requests(engine, prompts, num_tokens):
        started = time.perf_counter()
        tokens: Prompts = [[] for _ in prompts]
        while not all(tokens):
            assert engine.has_work, "streams ended before the last one's prompt was computed"
            _collect(engine, tokens)
        elapsed = time.perf_counter() - started
        yield Streams(engine, len(prompts), elapsed, sum(map(len, prompts)) + sum(map(len, tokens)))
