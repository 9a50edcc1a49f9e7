"""Which steps are recorded as graphs, and which of them a step replays; the graphs are fakes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from engine.cuda_graphs import DecodeGraphs, bucket_sizes


class FakeGraph:
    """Says when it is replayed."""

    log: list[str]

    def __init__(self) -> None:
        self.number = len(self.log)

    def pool(self) -> int:
        return 7

    def replay(self) -> None:
        self.log.append(f"replay {self.number}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on a GPU that is not there."""
    FakeGraph.log = log = []

    @contextmanager
    def record(graph: FakeGraph, pool: int | None, capture_error_mode: str) -> Iterator[None]:
        log.append(f"record with pool {pool}")
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return log


def compute(num_seqs: int) -> tuple[Tensor, Tensor | None]:
    rows = torch.arange(num_seqs)[:, None]
    return rows * torch.ones(3), rows * torch.ones(5)


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


def test_ranks_without_logits_have_graphs_too(log: list[str]) -> None:
    graphs = DecodeGraphs(lambda num_seqs: (compute(num_seqs)[0], None), [1, 2])
    graphs.capture()
    hidden, logits = graphs.replay(2)
    assert hidden.shape == (2, 3)
    assert logits is None
