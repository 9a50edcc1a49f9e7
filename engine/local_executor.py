"""LocalExecutor: rank 0 computes here and sends each batch to the other ranks, which follow.

All layers are on every rank; with stages of layers it is engine/pipeline.py.
"""

import numpy as np

from engine.batch import Batch, Sampling
from engine.config import EngineConfig
from engine.outputs import StepResult
from engine.parallel import ParallelGroup
from engine.weights.peers import Peers
from engine.worker import Worker


class LocalExecutor:
    def __init__(
        self,
        config: EngineConfig,
        group: ParallelGroup | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._group = group or ParallelGroup()
        self._worker = Worker(config, self._group, peers)
        self._result: StepResult | None = None
        self.info = self._worker.info

    def launch(self, batch: Batch, sampling: Sampling) -> None:
        self._group.broadcast_array(batch.buffer)
        self._result = self._worker.execute(batch, sampling)

    def collect(self) -> StepResult:
        result, self._result = self._result, None
        assert result is not None, "a step was launched, and rank 0 samples"
        return result

    def close(self) -> None:
        self._group.broadcast_array(STOP)
        self._group.leave()


def follow(worker: Worker, group: ParallelGroup) -> None:
    """The loop of ranks 1 and up: compute what rank 0 sends until it says stop."""
    while len(buffer := group.broadcast_array(None)) > 0:
        worker.execute(Batch.unpack(buffer), None)
    group.leave()


STOP = np.empty(0, dtype=np.int32)
