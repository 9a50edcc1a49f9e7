"""Draws: known answers, exact distributions, and transformers' filters as oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.draw import Limits, RankLimits, argmax, draw, weigh_
from engine.philox import philox4x32, uniforms
from tests import sampling_reference as reference

# philox4x32 10 rounds: counter, key, output (Random123 1.14, tests/kat_vectors)
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, output: str) -> None:
    columns = [np.array([[w] * 3 for w in words(text)], np.uint64) for text in (counter, key)]
    result = philox4x32(columns[0], columns[1])
    assert result.T.tolist() == [words(output)] * 3
    assert reference.philox(words(counter), words(key)) == words(output)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40)), min_size=1))
@settings(max_examples=30, deadline=None)
def test_uniforms_depend_on_their_own_seed_and_position_only(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = np.array(pairs, dtype=np.uint64).T
    numbers = uniforms(seeds, positions.astype(np.int64))
    assert numbers.tolist() == [reference.uniform(seed, position) for seed, position in pairs]
    assert ((numbers > 0) & (numbers < 1)).all()


def draw_evenly(
    logits: Tensor,
    num_draws: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> NDArray[np.int64]:
    """Counts per token when the uniforms are the midpoints of num_draws equal steps."""
    vocab_size = len(logits)
    rows = logits.repeat(num_draws, 1)
    weights = weigh_(rows, argmax(rows)[1], torch.full((num_draws, 1), 1 / temperature))
    numbers = (torch.arange(num_draws, dtype=torch.float64)[:, None] + 0.5) / num_draws
    least = torch.full((num_draws, 1), min_p)
    if top_k == 0 and top_p == 1.0:
        limits = Limits(min_p=least, ranked=None)
    else:
        ranked = RankLimits(
            rows=None,
            top_k=torch.full((num_draws, 1), min(top_k or vocab_size, vocab_size)),
            top_p=torch.full((num_draws, 1), top_p, dtype=torch.float64),
            min_p=least,
        )
        limits = Limits(min_p=None, ranked=ranked)
    return np.bincount(draw(weights, numbers, limits).numpy(), minlength=vocab_size)


@pytest.mark.parametrize("vocab_size", [7, 128, 300, 1000])
@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 0.7},
        {"min_p": 0.1},
        {"top_k": 5},
        {"top_k": 200},
        {"top_p": 0.8},
        {"top_p": 0.99, "temperature": 2.0},
        {"top_k": 150, "top_p": 0.9, "temperature": 3.0},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
        {"top_k": 150, "top_p": 0.3, "temperature": 3.0},
        {"top_p": 0.97, "min_p": 0.2, "temperature": 5.0},
        {"top_k": 140, "min_p": 0.3},
    ],
)
def test_filters_agree_with_transformers(vocab_size: int, settings_: dict[str, float]) -> None:
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2
    warpers = LogitsProcessorList()
    warpers.append(TemperatureLogitsWarper(float(settings_.get("temperature", 1.0))))
    if "top_k" in settings_:
        warpers.append(TopKLogitsWarper(int(settings_["top_k"])))
    if "top_p" in settings_:
        warpers.append(TopPLogitsWarper(settings_["top_p"]))
    if "min_p" in settings_:
        # transformers measures min_p against what top_p left; the greatest is always left
        warpers.append(MinPLogitsWarper(settings_["min_p"]))
    expected = warpers(torch.zeros((1, 1), dtype=torch.int64), logits[None].double())[0]
    num_draws = 500
    counts = draw_evenly(logits, num_draws, **settings_)  # type: ignore[arg-type]
    probabilities = expected.softmax(0).numpy()
    assert np.abs(counts - probabilities * num_draws).max() < 1.01
    assert counts[probabilities == 0].sum() == 0


@pytest.mark.parametrize("vocab_size", [10, 400])
def test_ties_are_broken_by_lower_id(vocab_size: int) -> None:
    flat = torch.zeros(vocab_size)
    assert draw_evenly(flat, 90, top_k=3).nonzero()[0].tolist() == [0, 1, 2]
    kept = draw_evenly(flat, 4 * vocab_size, top_p=0.3).nonzero()[0]
    assert kept.tolist() == list(range(3 * vocab_size // 10))
    flat[-1] = 1.0
    assert draw_evenly(flat, 90, top_k=3).nonzero()[0].tolist() == [0, 1, vocab_size - 1]


@pytest.mark.parametrize("vocab_size", [5, 700])
@pytest.mark.parametrize("limit", [{}, {"top_k": 4}, {"top_p": 0.9999}, {"top_k": 300}])
def test_zero_weights_are_never_drawn_even_at_the_ends(
    vocab_size: int, limit: dict[str, float]
) -> None:
    weights = torch.zeros((3, vocab_size))
    weights[:, [1, vocab_size - 2]] = 1.0
    extremes = torch.tensor([[2.0**-53], [0.5], [1 - 2.0**-53]], dtype=torch.float64)
    ranked = RankLimits(
        rows=None,
        top_k=torch.full((3, 1), min(int(limit.get("top_k", vocab_size)), vocab_size)),
        top_p=torch.full((3, 1), limit.get("top_p", 1.0), dtype=torch.float64),
        min_p=torch.zeros((3, 1)),
    )
    limits = Limits(min_p=None, ranked=ranked if limit else None)
    assert draw(weights, extremes, limits).tolist() == [1, vocab_size - 2, vocab_size - 2]


def test_argmax_is_the_first_of_equals_and_survives_nan() -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)).round()
    logits[3, 700] = torch.inf
    logits[4, 999] = torch.nan
    logits[5] = -torch.inf
    ids, values = argmax(logits)
    assert ids.tolist() == logits.argmax(dim=1).tolist()
    assert torch.equal(values, logits.amax(dim=1)) or values[4].isnan()
