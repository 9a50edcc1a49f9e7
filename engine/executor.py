"""Executor: the seam between scheduling and computing. One method; tests and benchmarks fake it."""

from dataclasses import dataclass
from typing import Protocol

from engine.batch import Batch, Sampling
from engine.outputs import StepResult


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
