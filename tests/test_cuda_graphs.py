"""Which steps are recorded as graphs, which of them a step replays, and what that overwrites.

The graphs are fakes: they compute on the CPU what was recorded, into the tensors of that time.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.batch import Batch
from engine.cuda_graphs import DecodeGraphs, bucket_sizes
from engine.local_executor import STOP, follow


class FakeGraph:
    """The operations that ran while it was recorded, and where their results went."""

    log: list[str]

    def __init__(self) -> None:
        self.number = len(self.log)
        self.pool_number = -1
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def pool(self) -> int:
        return self.pool_number

    @torch.inference_mode()
    def replay(self) -> None:
        self.log.append(f"replay {self.number}")
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            if isinstance(again, Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)

    def reset(self) -> None:
        self.log.append(f"reset {self.number}")
        self.calls.clear()


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, result))
        return result


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on a GPU that is not there."""
    FakeGraph.log = log = []

    @contextmanager
    def record(graph: FakeGraph, pool: int | None, capture_error_mode: str) -> Iterator[None]:
        log.append(f"record with pool {pool}")
        graph.pool_number = 7 + graph.number if pool is None else pool
        with Recorder(graph):
            yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return log


def compute(num_seqs: int) -> tuple[Tensor, Tensor | None]:
    rows = torch.arange(num_seqs)[:, None]
    return rows * torch.ones(3), rows * torch.ones(5)


class Step:
    """Reads the same memory each time, as a recorded step must."""

    def __init__(self, max_num_seqs: int) -> None:
        self.inputs = torch.full((max_num_seqs,), torch.nan)

    def set(self, *inputs: float) -> None:
        """For so many rows; those beyond are padding, which no result may contain."""
        self.inputs.fill_(torch.nan)[: len(inputs)] = torch.tensor(inputs)

    def compute(self, num_seqs: int) -> tuple[Tensor, Tensor]:
        rows = self.inputs[:num_seqs, None]
        return rows + torch.arange(3), rows * torch.arange(1, 6)


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (20, [1, 2, 4, 8, 16, 20]), (64, [1, 2, 4, *range(8, 65, 8)])],
)
def test_buckets_end_with_the_most_sequences(max_num_seqs: int, sizes: list[int]) -> None:
    assert bucket_sizes(max_num_seqs) == sizes


def test_large_batches_have_coarser_buckets() -> None:
    sizes = bucket_sizes(400)
    assert sizes[sizes.index(64) :][:3] == [64, 80, 96]
    assert sizes[sizes.index(256) :] == [256, 288, 320, 352, 384, 400]


def test_the_largest_is_recorded_first_and_the_others_share_its_memory(log: list[str]) -> None:
    graphs = DecodeGraphs(compute, [1, 2, 4])
    graphs.capture()
    assert log == ["record with pool None", *["record with pool 7"] * 2]


@pytest.mark.parametrize(("num_seqs", "graph"), [(1, 2), (2, 1), (3, 0), (4, 0)])
def test_a_step_replays_the_smallest_that_holds_it(
    num_seqs: int, graph: int, log: list[str]
) -> None:
    graphs = DecodeGraphs(compute, [1, 2, 4])
    graphs.capture()
    hidden, logits = graphs.replay(num_seqs)
    assert log[-1] == f"replay {graph}"
    assert torch.equal(hidden, compute(num_seqs)[0])
    assert logits is not None
    assert torch.equal(logits, torch.arange(num_seqs)[:, None] * torch.ones(5))


def test_a_replay_computes_from_what_is_there_now(log: list[str]) -> None:
    """In buckets of all sizes, with rows of padding or without."""
    step = Step(8)
    graphs = DecodeGraphs(step.compute, [1, 2, 4, 8])
    graphs.capture()
    for num_seqs in (3, 8, 1, 5, 2, 4, 7):
        inputs = [float(10 * num_seqs + row) for row in range(num_seqs)]
        step.set(*inputs)
        hidden, logits = graphs.replay(num_seqs)
        assert logits is not None
        rows = torch.tensor(inputs)[:, None]
        assert torch.equal(hidden, rows + torch.arange(3))
        assert torch.equal(logits, rows * torch.arange(1, 6))


def test_all_buckets_write_the_same_outputs_and_their_own_rows_only(log: list[str]) -> None:
    step = Step(4)
    graphs = DecodeGraphs(step.compute, [1, 2, 4])
    graphs.capture()
    step.set(1, 2, 3, 4)
    outputs = graphs.replay(4)
    before = [each.clone() for each in outputs if each is not None]
    step.set(50, 60)
    assert len(before) == 2
    for now, then, few in zip(outputs, before, graphs.replay(2), strict=True):
        assert now is not None
        assert few is not None
        assert few.data_ptr() == now.data_ptr()
        assert torch.equal(now[:2], few)
        assert not torch.equal(now[:2], then[:2])
        assert torch.equal(now[2:], then[2:])


def test_closed_graphs_are_gone(log: list[str]) -> None:
    step = Step(2)
    graphs = DecodeGraphs(step.compute, [1, 2])
    graphs.capture()
    output = weakref.ref(graphs.replay(2)[0].untyped_storage())
    graphs.close()
    assert log[-2:] == ["reset 0", "reset 1"]
    assert output() is None


def test_a_rank_closes_its_worker_before_it_leaves_the_group() -> None:
    """NCCL would wait for the graphs that hold its collectives."""
    log: list[str] = []

    class Rank:
        def broadcast_array(self, array: None) -> np.ndarray:
            return STOP

        def launch(self, batch: Batch, sampling: None) -> None:
            raise AssertionError

        def close(self) -> None:
            log.append("close")

        def leave(self) -> None:
            log.append("leave")

    follow(Rank(), Rank())  # type: ignore[arg-type]
    assert log == ["close", "leave"]


def test_ranks_without_logits_have_graphs_too(log: list[str]) -> None:
    graphs = DecodeGraphs(lambda num_seqs: (compute(num_seqs)[0], None), [1, 2])
    graphs.capture()
    hidden, logits = graphs.replay(2)
    assert hidden.shape == (2, 3)
    assert logits is None
