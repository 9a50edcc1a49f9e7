"""StubExecutor: steps that compute nothing, so that what remains is what Manta itself costs.

Everything around the Executor seam is the real thing. `install` puts it into the process of
an engine actor.
"""

import json
import os
import time
from collections import deque
from pathlib import Path

import numpy as np

from engine.batch import Batch, Sampling
from engine.config import EngineConfig
from engine.executor import EngineInfo
from engine.outputs import StepResult

STEP_MS = "MANTA_STUB_STEP_MS"  # environment variable: how long every step takes


class StubExecutor:
    """Answers any step after `step_s` seconds with token ids that change from step to step."""

    def __init__(self, info: EngineInfo, step_s: float = 0.0) -> None:
        self.info = info
        self._step_s = step_s
        self._num_steps = 0
        self._num_sampled: deque[int] = deque()  # of each step in flight

    def launch(self, batch: Batch, sampling: Sampling) -> None:
        self._num_sampled.append(batch.num_sampled)

    def collect(self) -> StepResult:
        if self._step_s:
            time.sleep(self._step_s)
        self._num_steps += 1
        # From the middle of the vocabulary: ordinary pieces of words, no special tokens.
        token_id = self.info.vocab_size // 4 + self._num_steps % (self.info.vocab_size // 4)
        return StepResult(np.full(self._num_sampled.popleft(), token_id, dtype=np.int32))

    def close(self) -> None:
        pass


def stub_info(model: str, num_blocks: int = 65536) -> EngineInfo:
    """As the executor of this checkpoint would report, with room for any number of sequences."""
    config = json.loads((Path(model) / "config.json").read_text())
    return EngineInfo(
        vocab_size=config["vocab_size"],
        session_len=config["max_position_embeddings"],
        num_blocks=num_blocks,
        block_size=16,
        dtype="bfloat16",
        device="cpu",
        tp=1,
    )


def install() -> None:
    """In this process, engine actors get a StubExecutor (stub_site/sitecustomize.py calls it)."""
    from engine import local_executor

    def make(config: EngineConfig, *_: object) -> StubExecutor:
        return StubExecutor(stub_info(config.model), float(os.environ[STEP_MS]) / 1000)

    vars(local_executor)["LocalExecutor"] = make
