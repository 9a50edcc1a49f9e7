"""Pipeline: steps that travel through stages of layers, up to `pp` of them at once.

    stage 0     launch(B) ─▶ layers ─┐            launch(C) ─▶ layers ─┐     collect(B) …
    stage 1         layers of A      └─▶ layers of B │                 └─▶ layers of C
    rank 0                      collect(A) ◀─────────┘ tokens of A, drawn on the last stage

Rank r of a stage hands each step to rank r of the next: the packed batch, what sampling needs
(on rank 0) and the hidden states. Sending waits for nothing: a stage takes a step when it
is done with the one before. Steps are computed in the order of their launch on every rank, so
that each sees the keys and values of those before it.
"""

import pickle
from collections import deque

import numpy as np
import torch
import torch.distributed as dist

from engine.batch import Batch, Int32Array, Sampling
from engine.config import EngineConfig
from engine.local_executor import STOP
from engine.outputs import StepResult
from engine.parallel import ParallelGroup
from engine.weights.peers import Peers
from engine.worker import AnyWorker, make_worker


class PipelineExecutor:
    """Rank 0 of the first stage: computes it in `launch`, and hears from the last in `collect`."""

    def __init__(
        self, config: EngineConfig, group: ParallelGroup, peers: Peers | None = None
    ) -> None:
        assert group.num_stages > 1
        self._group = group
        self._worker = make_worker(config, group, peers)
        self._links = StageLinks(group, self._worker, config.max_num_batched_tokens)
        self.info = self._worker.info

    def launch(self, batch: Batch, sampling: Sampling) -> None:
        self._group.broadcast_array(batch.buffer)
        hidden = self._worker.forward(batch, None)
        self._links.send_step(batch.buffer, pickle.dumps(sampling), hidden)

    def collect(self) -> StepResult:
        return self._links.receive_result()

    def close(self) -> None:
        self._group.broadcast_array(STOP)
        self._links.send_stop()
        self._worker.close()
        self._group.leave()


def follow_stage(config: EngineConfig, worker: AnyWorker, group: ParallelGroup) -> None:
    """The loop of every other rank: compute what comes, hand it on, until rank 0 says stop."""
    links = StageLinks(group, worker, config.max_num_batched_tokens)
    while (step := links.receive_step()) is not None:
        buffer, sampling, hidden = step
        batch = Batch.unpack(buffer)
        hidden = worker.forward(batch, hidden)
        if not group.is_last_stage:
            links.send_step(buffer, sampling, hidden)
            continue
        result = worker.finish(batch, hidden, pickle.loads(sampling) if sampling else None)
        if result is not None:
            links.send_result(result)
    links.send_stop()
    worker.close()
    group.leave()


class StageLinks:
    """One rank's connections to its neighbours in the stages before and after."""

    def __init__(self, group: ParallelGroup, worker: AnyWorker, max_num_tokens: int) -> None:
        self._group = group
        self._before = group.global_rank - group.size
        self._after = group.global_rank + group.size
        self._last = group.num_ranks - group.size  # rank 0 of the last stage
        # A step's hidden states are used up before the next step's are received.
        self._hidden = torch.empty(
            0 if group.stage == 0 else max_num_tokens,
            worker.model.spec.hidden_size,
            dtype=worker.model.dtype,
            device=worker.model.tensor_device,
        )
        # A tensor must live until it is sent. Those of the step before the last `num_stages`
        # are: no more steps are in flight.
        self._sending: deque[list[tuple[dist.Work | None, torch.Tensor]]] = deque()

    def receive_step(self) -> tuple[Int32Array, bytes, torch.Tensor | None] | None:
        """The next step's batch, its Sampling (rank 0) and its hidden states; None: stop.

        Ranks of the first stage have them from rank 0, and embed the batch's tokens themselves.
        """
        if self._group.stage == 0:
            buffer = self._group.broadcast_array(None)
            return (buffer, b"", None) if len(buffer) > 0 else None
        num_bytes, num_sampling_bytes = self._receive_array(np.dtype(np.int64), 2, self._before)
        if num_bytes == 0:
            return None
        data = self._receive_array(np.dtype(np.uint8), num_bytes + num_sampling_bytes, self._before)
        buffer = data[:num_bytes].view(np.int32)
        hidden = self._hidden[: Batch.unpack(buffer).num_tokens]
        dist.recv(hidden, self._before)
        return buffer, data[num_bytes:].tobytes(), hidden

    def send_step(self, buffer: Int32Array, sampling: bytes, hidden: torch.Tensor) -> None:
        """To the next stage, without waiting until it is ready."""
        data = np.concatenate([buffer.view(np.uint8), np.frombuffer(sampling, dtype=np.uint8)])
        lengths = np.array([buffer.nbytes, len(sampling)])
        self._keep(
            self._send_array(lengths, self._after),
            self._send_array(data, self._after),
            (dist.isend(hidden, self._after), hidden),
        )

    def send_stop(self) -> None:
        """To the next stage, if there is one; waits until everything is sent."""
        if not self._group.is_last_stage:
            self._keep(self._send_array(np.zeros(2, dtype=np.int64), self._after))
        while self._sending:
            self._finish_oldest()

    def send_result(self, result: StepResult) -> None:
        """From where tokens are drawn to rank 0."""
        data = np.frombuffer(pickle.dumps(result), dtype=np.uint8).copy()
        self._keep(
            self._send_array(np.array([len(data)]), 0),
            self._send_array(data, 0),
        )

    def receive_result(self) -> StepResult:
        (num_bytes,) = self._receive_array(np.dtype(np.int64), 1, self._last)
        data = self._receive_array(np.dtype(np.uint8), num_bytes, self._last)
        result: StepResult = pickle.loads(data.tobytes())
        return result

    def _send_array(self, array: np.ndarray, rank: int) -> tuple[dist.Work | None, torch.Tensor]:
        tensor = torch.from_numpy(array)
        return dist.isend(tensor, rank, group=self._group.all_arrays), tensor

    def _receive_array(self, dtype: np.dtype, size: int, rank: int) -> np.ndarray:
        array = np.empty(size, dtype)
        dist.recv(torch.from_numpy(array), rank, group=self._group.all_arrays)
        return array

    def _keep(self, *sends: tuple[dist.Work | None, torch.Tensor]) -> None:
        self._sending.append(list(sends))
        if len(self._sending) > self._group.num_stages:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        for work, _ in self._sending.popleft():
            if work is not None:
                work.wait()
