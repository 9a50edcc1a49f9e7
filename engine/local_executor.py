"""LocalExecutor: rank 0 computes here and sends each batch to the other ranks, which follow."""

import numpy as np

from engine.batch import Batch, Sampling
from engine.config import EngineConfig
from engine.executor import EngineInfo
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
