"""LocalExecutor: rank 0 computes here and sends each batch to the other ranks, which follow.

All layers are on every rank; with stages of layers it is engine/pipeline.py.
"""

from collections import deque

import numpy as np

from engine.batch import Batch, Sampling
from engine.config import EngineConfig
from engine.executor import PendingStep
from engine.outputs import StepResult
from engine.parallel import ParallelGroup
from engine.weights.peers import Peers
from engine.worker import AnyWorker, make_worker


class LocalExecutor:
    def __init__(
        self,
        config: EngineConfig,
        group: ParallelGroup | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._group = group or ParallelGroup()
        self._worker = make_worker(config, self._group, peers)
        self._launched: deque[PendingStep] = deque()
        self.info = self._worker.info

    def launch(self, batch: Batch, sampling: Sampling) -> None:
        self._group.broadcast_array(batch.buffer)
        step = self._worker.launch(batch, sampling)
        assert step is not None, "rank 0 samples"
        self._launched.append(step)

    def collect(self) -> StepResult:
        return self._launched.popleft().get()

    def close(self) -> None:
        self._group.broadcast_array(STOP)
        self._worker.close()
        self._group.leave()


def follow(worker: AnyWorker, group: ParallelGroup) -> None:
    """The loop of ranks 1 and up: compute what rank 0 sends until it says stop."""
    while len(buffer := group.broadcast_array(None)) > 0:
        worker.launch(Batch.unpack(buffer), None)
    worker.close()
    group.leave()


STOP = np.empty(0, dtype=np.int32)
