"""Checkpoints that real tools wrote: our readers against the tools' own numbers.

tools/quantized_fixtures.py made them, and says what a fixture holds.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from engine.models import load_spec
from engine.models.layout import layer_linears
from engine.weights.checkpoint import Checkpoint
from engine.weights.stored import read_dense
from tests.paged_decoding import PagedDecoder, Replay, replay_rank
from tests.test_tensor_parallel import free_port
from tools.quantized_fixtures import ALL, FIXTURES, KEPT_LINEAR, NUM_GREEDY


def test_every_fixture_is_there() -> None:
    assert {path.name for path in FIXTURES.iterdir()} == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_those_the_tool_reads(name: str) -> None:
    path = FIXTURES / name
    linears = layer_linears(load_spec(path), 1)
    (linear,) = (linear for linear in linears.qkv if linear.module == KEPT_LINEAR)
    with Checkpoint(path) as checkpoint:
        weight = read_dense(checkpoint, linear)
    torch.testing.assert_close(
        weight, expected(path)[KEPT_LINEAR], rtol=tolerance(name), atol=tolerance(name) / 8
    )


@pytest.mark.parametrize("name", ALL)
def test_logits_and_greedy_tokens_are_those_of_the_tools_weights(name: str) -> None:
    path = FIXTURES / name
    numbers, ours = expected(path), PagedDecoder(path)
    for ids, logits, greedy in zip(
        numbers["input_ids"].tolist(), numbers["logits"], numbers["greedy"].tolist(), strict=True
    ):
        assert_close(name, ours.logits(ids), logits)
        assert ours.greedy(ids, NUM_GREEDY) == greedy


def test_two_ranks_give_the_same_logits(tmp_path: Path) -> None:
    numbers = {name: expected(FIXTURES / name) for name in ALL}
    jobs = [
        Replay(FIXTURES / name, torch.float32, tensors["input_ids"][0].tolist(), [])
        for name, tensors in numbers.items()
    ]
    out = tmp_path / "logits.pt"
    spawn(replay_rank, (f"127.0.0.1:{free_port()}", out, jobs), nprocs=2)  # type: ignore[no-untyped-call]
    for (name, tensors), found in zip(numbers.items(), torch.load(out), strict=True):
        assert_close(name, found, tensors["logits"][0])


def assert_close(name: str, found: Tensor, logits: Tensor) -> None:
    assert float((found - logits).abs().max() / logits.std()) < 30 * tolerance(name)


def expected(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(path / "expected.safetensors")
    return found


def tolerance(name: str) -> float:
    """float32's; AutoAWQ notes in fp16 what a gemv checkpoint stands for."""
    return 2**-10 if name == "autoawq-gemv" else 1e-6
