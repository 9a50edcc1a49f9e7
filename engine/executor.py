"""Executor: the seam between scheduling and computing; tests and benchmarks fake it.

A step is launched and its result collected. Up to `info.max_in_flight` steps are in flight
between the two.
"""

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
    pp: int = 1
    # Steps launched before the first is collected: one per stage, or the one that runs on a GPU
    # and the next. With pp == 1 the second may have input ids that the first samples.
    max_in_flight: int = 1
    cuda_graphs: bool = False  # whether steps in which every sequence decodes are replayed


class PendingStep(Protocol):
    """A step that a worker has launched."""

    def get(self) -> StepResult:
        """Blocks until the sampled tokens are known."""
        ...


class Executor(Protocol):
    info: EngineInfo

    def launch(self, batch: Batch, sampling: Sampling) -> None:
        """Start one step on all ranks; it sees what the steps launched before it wrote."""
        ...

    def collect(self) -> StepResult:
        """The result of the oldest step in flight; blocks until the sampled tokens are known."""
        ...

    def close(self) -> None:
        """Release the ranks; no step is in flight, and no call may follow."""
        ...
