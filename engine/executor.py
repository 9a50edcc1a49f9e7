"""Executor: the seam between scheduling and computing. One method; tests and benchmarks fake it.

LocalExecutor drives a Worker in this process and, when there are more ranks, sends each batch to
them first; `follow` is the loop of those other ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.batch import Batch, Sampling
from engine.config import EngineConfig
from engine.outputs import StepResult
from engine.parallel import ParallelGroup
from engine.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is learnt when the weights are loaded and the cache is sized."""

    vocab_size: int
    session_len: int  # longest sequence: the model's limit, the config's, the cache's
    num_blocks: int
    block_size: int
    dtype: str
    device: str
    tp: int


class Executor(Protocol):
    info: EngineInfo

    def execute(self, batch: Batch, sampling: Sampling) -> StepResult:
        """Compute one step on all ranks; blocks until the sampled tokens are known."""
        ...

    def close(self) -> None:
        """Release the ranks; no call may follow."""
        ...


class LocalExecutor:
    """Rank 0: computes its share here, other ranks follow over the process group."""

    def __init__(self, config: EngineConfig, group: ParallelGroup | None = None) -> None:
        self._group = group or ParallelGroup()
        self._worker = Worker(config, self._group)
        self.info = EngineInfo(
            vocab_size=self._worker.spec.vocab_size,
            session_len=self._worker.session_len,
            num_blocks=self._worker.num_blocks,
            block_size=self._worker.block_size,
            dtype=str(self._worker.dtype).removeprefix("torch."),
            device=self._worker.device,
            tp=self._group.size,
        )

    def execute(self, batch: Batch, sampling: Sampling) -> StepResult:
        self._group.broadcast_array(batch.buffer)
        result = self._worker.execute(batch, sampling)
        assert result is not None, "rank 0 samples"
        return result

    def close(self) -> None:
        self._group.broadcast_array(_STOP)
        self._group.leave()


def follow(worker: Worker, group: ParallelGroup) -> None:
    """The loop of ranks 1 and up: compute what rank 0 sends until it says stop."""
    while len(buffer := group.broadcast_array(None)) > 0:
        worker.execute(Batch.unpack(buffer), None)
    group.leave()


_STOP = np.empty(0, dtype=np.int32)
