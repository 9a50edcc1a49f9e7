"""Sampling on the GPU against the definitions: slow references in numpy and plain Python."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from engine.batch import NewRow
from engine.philox import philox4x32
from engine.sampling_params import SamplingParams
from kernels.gpu import sampling
from kernels.gpu.logit_edits import edit_logits
from tests.interpreted.sampling_harness import Sampling, new_row, sample_rows
from tests.sampling_reference import ReferenceRow

ROUNDING = 3e-6  # of cuts and sums in float32
EOS = 1


def gumbel(seed: int, position: int, vocab_size: int) -> NDArray[np.float64]:
    """Noise of a whole vocabulary in float64, from another Philox than the kernels'."""
    num_counters = -(-vocab_size // 4)
    counters = np.zeros((4, num_counters), dtype=np.uint64)
    counters[0] = np.arange(num_counters)
    counters[1] = position
    keys = np.array([[seed % 2**32], [(seed % 2**64) >> 32]], dtype=np.uint64)
    words = philox4x32(counters, np.repeat(keys, num_counters, axis=1)).T.reshape(-1)
    uniforms = (words[:vocab_size].astype(np.float64) + 0.5) / 2**32
    return -np.log(-np.log1p(-np.minimum(uniforms, 1 - 2**-24)))


def kept_tokens(logits: NDArray[np.float64], params: SamplingParams) -> tuple[list[int], bool]:
    """What top_k, top_p and min_p leave, and whether that is clear of float32's rounding."""
    order = np.argsort(-logits, kind="stable")
    if params.top_k > 0:
        order = order[: params.top_k]
    with np.errstate(under="ignore"):
        weights = np.exp((logits[order] - logits.max()) / params.temperature)
    clear = True
    if params.top_p < 1:
        shares = np.cumsum(weights) / weights.sum()
        clear = bool(np.abs(shares - params.top_p).min() > ROUNDING)
        stay = 1 + int((shares < params.top_p).sum())
        order, weights = order[:stay], weights[:stay]
    if params.min_p > 0:
        distances = np.abs(weights - params.min_p)
        clear = clear and bool(distances[distances > 0].min(initial=1.0) > ROUNDING)
        order = order[weights >= params.min_p]
    return order.tolist(), clear


def expected_token(
    logits: NDArray[np.float64], params: SamplingParams, seed: int, position: int
) -> int | None:
    """The winner of the race among the tokens that stay; None when it is a close call."""
    kept, clear = kept_tokens(logits, params)
    scores = logits[kept] / params.temperature + gumbel(seed, position, len(logits))[kept]
    best = np.sort(scores)[-2:]
    close = len(best) == 2 and best[1] - best[0] < 1e-4 * max(1.0, abs(best[1]))
    return kept[int(np.argmax(scores))] if clear and not close else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 130, 2048, 4097])
def test_greedy_is_the_lowest_of_the_greatest(dtype: torch.dtype, vocab_size: int) -> None:
    logits = (torch.randn(3, vocab_size) * 2).round().to(dtype)
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert sample_rows(logits, SamplingParams(temperature=0.0), [1, 2, 3]) == expected
    padded = torch.cat([logits, torch.full((2, vocab_size), torch.nan, dtype=dtype)])
    sampler = Sampling(vocab_size, 4)
    new = [new_row(i, SamplingParams(temperature=0.0)) for i in range(3)]
    assert sampler(padded, [2, 0, 1], *new).token_ids.tolist() == expected


def use_small_tiles(patch: pytest.MonkeyPatch, capacity: int = 512) -> None:
    for name, value in (("BLOCK", 64), ("GROUP", 16), ("TILE", 128), ("CAPACITY", capacity)):
        patch.setattr(sampling, name, value)


LIMITS: list[dict[str, float]] = [
    {},
    {"temperature": 0.01},
    {"temperature": 1e-6},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 3, "temperature": 2.0},
    {"top_k": 10**6},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.9999},
    {"min_p": 1.0},
    {"top_k": 40},
    {"top_p": 0.9, "temperature": 0.7},
    {"min_p": 0.2},
    {"top_k": 200, "top_p": 0.8, "min_p": 0.1},
    {"top_k": 6, "top_p": 0.5, "min_p": 0.3, "temperature": 3.0},
]


def adversarial_rows(vocab_size: int) -> Tensor:
    rows = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    rows[1] = (rows[1] * 2).round() / 2  # many ties
    rows[2] = 0.25  # nothing else
    rows[3, 5:] = -torch.inf
    rows[4] = rows[4].round() * -1e-3  # with both zeros
    rows[5, 17] = 60.0
    return rows


@pytest.mark.parametrize(
    ("limits", "geometry"),
    [(limits, "one tile") for limits in LIMITS]
    + [({}, "gathered"), ({"temperature": 3.0}, "gathered")]  # in more blocks than one
    + [(limits, name) for limits in LIMITS[-5:] for name in ("gathered", "on the row", "bfloat16")],
    ids=str,
)
def test_the_token_is_the_winner_of_those_that_stay(
    limits: dict[str, Any], geometry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if geometry in ("gathered", "on the row"):
        use_small_tiles(monkeypatch, capacity=512 if geometry == "gathered" else 4)
    rows = adversarial_rows(300)
    rows = rows.bfloat16() if geometry == "bfloat16" else rows
    params, seeds = SamplingParams(**limits), [11, -5, 2**62 + 3, 7, 8, 9]
    tokens = sample_rows(rows, params, seeds)
    expected = [
        expected_token(row, params, seed, position)
        for position, (row, seed) in enumerate(zip(rows.double().numpy(), seeds, strict=True))
    ]
    for token, choice in zip(tokens, expected, strict=True):
        assert choice is None or token == choice
    assert sum(choice is not None for choice in expected) >= 3


def test_of_equal_tokens_the_lowest_ids_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3 of ten are three: in float32 they would be four."""
    use_small_tiles(monkeypatch)
    tokens = sample_rows(torch.zeros(16, 10), SamplingParams(top_p=0.3), range(16))
    assert set(tokens) == {0, 1, 2}
    tokens = sample_rows(torch.zeros(16, 10), SamplingParams(top_k=4), range(16))
    assert set(tokens) == {0, 1, 2, 3}


def test_the_noise_gives_each_token_its_probability() -> None:
    """The tests above hold the kernels to this noise."""
    logits = np.array([0.0, 1.0, -2.0, 0.5, -7.0])
    drawn = [np.argmax(logits + gumbel(seed * 2**31, seed % 7, 5)) for seed in range(20_000)]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    observed = np.bincount(drawn, minlength=5)
    assert chisquare(observed, probabilities * len(drawn)).pvalue > 1e-3


def test_draws_of_a_batch_have_the_distribution_of_the_softmax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_small_tiles(monkeypatch)
    logits = torch.tensor([0.5, -1.0, 1.5, 0.0, 1.0, -2.0]).expand(250, 6)
    observed = np.bincount(sample_rows(logits, SamplingParams(temperature=1.3), range(250)))
    probabilities = (logits[0].double() / 1.3).softmax(0).numpy()
    assert chisquare(observed, probabilities * 250).pvalue > 1e-3


# --- edits ------------------------------------------------------------------------------------


EDITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5, "presence_penalty": 0.25, "frequency_penalty": -0.75},
    {"frequency_penalty": 1.0},
    {"logit_bias": {3: 100.0, 5: -1.5, 250: 2.0}, "presence_penalty": 2.0},
    {"allowed_token_ids": [3, 3, 7, 200, 9], "logit_bias": {7: 1.0, 8: 100.0}},
    {"bad_words": [[3], [7, 9], [5, 7, 9], [9, 9, 9, 250], [4, 2, 5]]},
    {"bad_words": [[8, 5, 7, 5, 250, 4, 2, 9, 6], [5, 7, 5, 250, 4, 2, 9, 3]]},
    {"min_tokens": 3, "stop_token_ids": [3, 250]},
    {
        "allowed_token_ids": list(range(250, 270)),
        "bad_words": [[252, 253], [253]],
        "min_tokens": 2,
        "repetition_penalty": 2.0,
        "logit_bias": {251: 4.0},
    },
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_equal_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of all kinds together, several steps, rows in another order each time."""
    edited: list[Tensor] = []

    def recorded(*arguments: Any) -> Tensor:
        edited.append(edit_logits(*arguments))
        return edited[-1]

    monkeypatch.setattr("engine.gpu_sampler.edit_logits", recorded)
    generator = torch.Generator().manual_seed(2)
    sampler = Sampling(270, len(EDITS) + 2)
    running = [
        ReferenceRow(
            SamplingParams(temperature=0.0, **edits),
            40 + row,
            (EOS,),
            [5, 7, 5, 250, 4],
            [2, 9, 9][: row % 4],
        )
        for row, edits in enumerate(EDITS)
    ]
    new = [
        NewRow(row, r.params, r.seed, r.eos_token_ids, list(r.prompt), list(r.output))
        for row, r in enumerate(running)
    ]
    for step in range(5):
        rows = torch.randperm(len(EDITS), generator=generator).tolist()
        logits = (torch.randn(len(rows), 270, generator=generator) * 8).round() / 4
        logits[:, [3, 5, 7, 9, 250, EOS]] += 4.0
        tokens = sampler(logits.to(dtype), rows, *new).token_ids.tolist()
        new = []
        expected = [running[row].edited(x) for row, x in zip(rows, logits.tolist(), strict=True)]
        torch.testing.assert_close(edited[step], torch.tensor(expected))
        assert tokens == [values.index(max(values)) for values in expected]
        for row, token in zip(rows, tokens, strict=True):
            running[row].output.append(token)


def test_bans_that_leave_nothing_and_broken_logits_are_flagged() -> None:
    logits = torch.zeros(9, 8)
    logits[[1, 6], 3] = torch.nan
    logits[[2, 7], 7] = torch.inf
    logits[[3, 8]] = -torch.inf
    params = [SamplingParams(top_k=2), SamplingParams(top_p=0.5)] * 2
    params += [SamplingParams(bad_words=[[3]], allowed_token_ids=[3]), SamplingParams(min_p=0.1)]
    params += [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=0.0)]
    sampler = Sampling(8, 9)
    result = sampler(logits, range(9), *[new_row(i, p) for i, p in enumerate(params)])
    assert result.invalid == [1, 2, 3, 4, 6, 7, 8]
    assert all(0 <= token < 8 for token in result.token_ids.tolist())
