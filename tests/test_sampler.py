"""The sampler against a slow reference, exact probabilities, transformers, and itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from engine.batch import NewRow, SamplingBatch
from engine.logit_edits import LogitEdits
from engine.outputs import TokenLogprobs
from engine.sampler import SampledTokens, Sampler, token_logprobs
from engine.sampling_params import SamplingParams
from tests.sampling_reference import ReferenceRow

SESSION_LEN = 64


def new_row(
    row: int,
    params: SamplingParams,
    *,
    seed: int = 0,
    eos: tuple[int, ...] = (),
    prompt: list[int] | None = None,
    output: list[int] | None = None,
) -> NewRow:
    return NewRow(row, params, seed, eos, prompt or [0], output or [])


def sample(sampler: Sampler, logits: Tensor, rows: list[int], *new_rows: NewRow) -> SampledTokens:
    return sampler.sample(
        logits.clone(), SamplingBatch(list(new_rows), np.array(rows, dtype=np.int32))
    )


def sample_one(logits: list[float] | Tensor, params: SamplingParams, **row: Any) -> int:
    """First token of a sequence alone in the sampler."""
    table = torch.as_tensor(logits, dtype=torch.float32)[None]
    sampler = Sampler(table.shape[1], 1, SESSION_LEN, "cpu")
    return int(sample(sampler, table, [0], new_row(0, params, **row)).token_ids[0])


def generate(
    logits: Tensor, params: SamplingParams, num_tokens: int, **row: Any
) -> tuple[list[int], Sampler]:
    """Tokens of one sequence that sees the same logits [V] at every step."""
    sampler = Sampler(len(logits), 4, SESSION_LEN, "cpu")
    new = [new_row(0, params, **row)]
    token_ids = []
    for _ in range(num_tokens):
        token_ids.append(int(sample(sampler, logits[None], [0], *new).token_ids[0]))
        new = []
    return token_ids, sampler


# --- against the reference -------------------------------------------------------------------


@st.composite
def sampling_params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    def sometimes(values: st.SearchStrategy[Any], otherwise: Any) -> Any:
        return draw(values) if draw(st.integers(0, 3)) == 0 else otherwise

    token_ids = st.integers(0, min(vocab_size, 12) - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5])),
        top_k=sometimes(st.integers(-1, vocab_size + 2), 0),
        top_p=sometimes(st.floats(0.05, 1.0), 1.0),
        min_p=sometimes(st.floats(0.0, 0.6), 0.0),
        # binary fractions, so that float32 and float64 agree on what is equal
        repetition_penalty=sometimes(st.sampled_from([0.5, 1.5, 2.0]), 1.0),
        presence_penalty=sometimes(st.sampled_from([-1.5, 0.25, 2.0]), 0.0),
        frequency_penalty=sometimes(st.sampled_from([-0.75, 0.25, 1.0]), 0.0),
        logit_bias=sometimes(
            st.dictionaries(token_ids, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=4), {}
        ),
        bad_words=sometimes(st.lists(st.lists(token_ids, min_size=1, max_size=3), max_size=4), ()),
        allowed_token_ids=sometimes(st.lists(token_ids, min_size=6, unique=True), None),
        min_tokens=sometimes(st.integers(0, 5), 0),
        stop_token_ids=draw(st.lists(token_ids, max_size=2)),
    )


@given(data=st.data(), vocab_size=st.sampled_from([12, 40, 400]))
@settings(max_examples=60, deadline=None)
def test_every_row_equals_the_reference(data: st.DataObject, vocab_size: int) -> None:
    """Random requests come, go and share batches in random order, step after step."""
    sampler = Sampler(vocab_size, 5, SESSION_LEN, "cpu")
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    token_ids = st.lists(st.integers(0, min(vocab_size, 12) - 1), max_size=6)
    running: dict[int, ReferenceRow] = {}
    for _ in range(5):
        new_rows = []
        for row in data.draw(st.sets(st.integers(0, 4), max_size=5)):
            reference = ReferenceRow(
                data.draw(sampling_params(vocab_size)),
                seed=data.draw(st.integers(-(2**63), 2**63 - 1)),
                eos_token_ids=(1,),
                prompt=[3, *data.draw(token_ids)],
                output=data.draw(token_ids),
            )
            running[row] = reference
            new_rows.append(
                NewRow(
                    row,
                    reference.params,
                    reference.seed,
                    (1,),
                    list(reference.prompt),
                    list(reference.output),
                )
            )
        chosen = [r for r in running if data.draw(st.booleans())]
        rows = data.draw(st.permutations(chosen))
        table = np.round(generator.normal(0, 2, (len(rows), vocab_size)) * 4) / 4  # many ties
        result = sample(sampler, torch.from_numpy(table).float(), rows, *new_rows)
        for row, logits, token_id in zip(
            rows, table.tolist(), result.token_ids.tolist(), strict=True
        ):
            if math.isfinite(max(running[row].edited(logits))):
                choices = running[row].choices(logits)
                assert not choices or token_id in choices, running[row]
            running[row].output.append(token_id)


# --- distributions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7, top_k=4),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.15),
        SamplingParams(top_k=6, top_p=0.9, min_p=0.05),
        SamplingParams(top_p=0.76, min_p=0.4),  # min_p first would leave top_p one token less
        SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3),
        SamplingParams(logit_bias={0: 1.5, 7: -2.0}, bad_words=[[5], [2, 3]], temperature=1.3),
    ],
)
def test_draws_follow_the_exact_distribution(params: SamplingParams) -> None:
    logits = [1.0, 0.3, -0.4, 0.9, 1.7, 0.0, -1.5, 0.6, -0.2]
    prompt, output, num_rows = [4, 2], [0, 0, 2], 12000
    sampler = Sampler(len(logits), num_rows, 8, "cpu")
    new_rows = [
        new_row(row, params, seed=1000 + row, prompt=prompt, output=output)
        for row in range(num_rows)
    ]
    table = torch.tensor(logits).repeat(num_rows, 1)
    token_ids = sample(sampler, table, list(range(num_rows)), *new_rows).token_ids
    expected, _ = ReferenceRow(params, 0, (), prompt, output).distribution(logits)
    counts = np.bincount(token_ids, minlength=len(logits))
    assert set(counts.nonzero()[0].tolist()) == set(expected)
    observed = [int(counts[token_id]) for token_id in expected]
    assert chisquare(observed, np.array(list(expected.values())) * num_rows).pvalue > 1e-3


def test_positions_of_one_seed_are_independent() -> None:
    """Neighbouring tokens of one sequence, as pairs: all 16 are equally likely."""
    sampler = Sampler(4, 1, 8, "cpu")
    new, token_ids = [new_row(0, SamplingParams(), seed=5)], []
    for _ in range(3200):
        token_ids.append(int(sample(sampler, torch.zeros(1, 4), [0], *new).token_ids[0]))
        new = []
    pairs = np.array(token_ids[0::2]) * 4 + np.array(token_ids[1::2])
    assert chisquare(np.bincount(pairs, minlength=16)).pvalue > 1e-3


# --- independence of batch, row and restart --------------------------------------------------

MIX = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(top_k=20),
    SamplingParams(top_k=200),
    SamplingParams(top_p=0.9, min_p=0.01),
    SamplingParams(min_p=0.05, temperature=1.4),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1),
    SamplingParams(bad_words=[[1, 2], [3]], logit_bias={4: 2.0}, logprobs=2),
]


def run_mix(logits: Tensor, members: list[int], rows: list[int], num_steps: int) -> NDArray[Any]:
    """Tokens [num_steps, members] of some of MIX, each with its own seed, in given rows."""
    sampler = Sampler(logits.shape[2], 16, SESSION_LEN, "cpu")
    new = [
        new_row(row, MIX[m], seed=m * 77, prompt=[1, 2, m])
        for row, m in zip(rows, members, strict=True)
    ]
    steps = [
        sample(sampler, table[members], rows, *(new if step == 0 else [])).token_ids
        for step, table in enumerate(logits[:num_steps])
    ]
    return np.stack(steps)


@pytest.mark.parametrize("vocab_size", [50, 1500])
def test_a_row_does_not_depend_on_its_batch(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, len(MIX), vocab_size, generator=generator) * 2
    together = run_mix(logits, list(range(len(MIX))), list(range(len(MIX))), 6)
    for member in range(len(MIX)):
        alone = run_mix(logits, [member], [9], 6)
        assert alone[:, 0].tolist() == together[:, member].tolist()
    order = [6, 2, 7, 0, 4, 1, 3, 5]
    permuted = run_mix(logits, order, [3, 15, 0, 7, 1, 2, 9, 4], 6)
    assert permuted.tolist() == together[:, order].tolist()


@pytest.mark.parametrize("params", MIX)
def test_a_resumed_sequence_continues_as_if_it_had_never_stopped(params: SamplingParams) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2))
    whole, _ = generate(logits, params, 8, seed=3, prompt=[1, 2])
    rest, _ = generate(logits, params, 5, seed=3, prompt=[1, 2], output=whole[:3])
    assert whole[3:] == rest


def test_a_reused_row_forgets_the_sequence_before() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(2, 1)
    sampler = Sampler(4, 2, SESSION_LEN, "cpu")
    first = SamplingParams(
        temperature=0, bad_words=[[1], [0, 2]], logit_bias={3: 9.0}, repetition_penalty=50.0
    )
    new_rows = [new_row(0, first), new_row(1, first)]
    assert sample(sampler, logits, [0, 1], *new_rows).token_ids.tolist() == [3, 3]
    plain = new_row(0, SamplingParams(temperature=0))
    assert sample(sampler, logits, [0, 1], plain).token_ids.tolist() == [1, 3]


def test_a_row_may_be_admitted_before_it_samples() -> None:
    sampler = Sampler(4, 2, SESSION_LEN, "cpu")
    params = SamplingParams(temperature=0, bad_words=[[1]])
    empty = sample(sampler, torch.zeros(0, 4), [], new_row(1, params))
    assert (len(empty.token_ids), empty.logprobs, empty.invalid) == (0, None, [])
    assert sample(sampler, torch.tensor([[0.0, 2.0, 1.0, 0.0]]), [1]).token_ids.tolist() == [2]


def test_the_last_token_of_a_full_session() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0, bad_words=[[1, 1]])
    prompt = [2] * SESSION_LEN
    assert sample_one([0.0, 1.0, 1.5], params, prompt=prompt) == 1


# --- single settings -------------------------------------------------------------------------


def test_min_tokens_bans_every_end_whatever_else_is_asked() -> None:
    params = SamplingParams(
        temperature=0,
        min_tokens=3,
        stop_token_ids=[2],
        logit_bias={1: 100.0, 2: 100.0},
        allowed_token_ids=[1, 2, 3],
    )
    token_ids, _ = generate(torch.tensor([9.0, 5.0, 4.0, 0.0]), params, 5, eos=(1,))
    assert token_ids == [3, 3, 3, 1, 1]


def test_min_tokens_counts_resumed_output() -> None:
    params = SamplingParams(temperature=0, min_tokens=3)
    token_ids, _ = generate(torch.tensor([0.0, 1.0]), params, 3, eos=(1,), output=[0, 0])
    assert token_ids == [0, 1, 1]


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ([5, 1], [2], 0),  # begins in the prompt, ends here
        ([5], [1, 2], 0),
        ([1, 2, 5], [], 3),  # the beginning is not at the end
        ([2], [], 3),  # the history is shorter than the word
        ([5, 1, 2], [], 0),
    ],
)
def test_bad_words_cannot_be_completed(prompt: list[int], output: list[int], expected: int) -> None:
    params = SamplingParams(temperature=0, bad_words=[[1, 2, 3], [4, 3], [2, 2, 3]])
    logits = [1.0, 0.0, 0.0, 2.0, 0.0, 0.0]
    assert sample_one(logits, params, prompt=prompt, output=output) == expected


def test_bad_words_agree_with_transformers() -> None:
    bad_words = [[7], [1, 2], [3, 1, 2], [2, 2], [1, 4]]
    generator = torch.Generator().manual_seed(3)
    oracle = NoBadWordsLogitsProcessor(bad_words)
    params = SamplingParams(temperature=0, bad_words=bad_words)
    for _ in range(20):
        prompt = torch.randint(0, 5, (6,), generator=generator)
        logits = torch.randn(1, 9, generator=generator)
        expected = oracle(prompt[None], logits.clone())[0]
        assert edit(logits, params, prompt.tolist(), []).tolist() == expected.tolist()


def edit(logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    """Edited logits [V] of a sequence alone."""
    edits = LogitEdits(logits.shape[1], 1, SESSION_LEN, "cpu")
    edits.admit(new_row(0, params, prompt=prompt, output=output))
    edits.select(np.array([0]))
    edited = logits.clone()
    edits.apply(edited, np.array([len(output)]))
    return edited[0]


def test_repetition_penalty_agrees_with_transformers() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(1, 50, generator=generator)
    token_ids = torch.randint(0, 50, (30,), generator=generator)
    for penalty in (0.7, 1.0, 1.8):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(token_ids[None], logits.clone())[0]
        params = SamplingParams(repetition_penalty=penalty)
        edited = edit(logits, params, token_ids[:20].tolist(), token_ids[20:].tolist())
        torch.testing.assert_close(edited, expected)


def test_a_short_history_beside_a_long_one() -> None:
    sampler = Sampler(3, 2, SESSION_LEN, "cpu")
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    new_rows = [new_row(0, params, prompt=[2, 1, 2, 1, 2]), new_row(1, params, prompt=[1])]
    logits = torch.tensor([[1.0, 1.5, 0.8]]).repeat(2, 1)
    assert sample(sampler, logits, [0, 1], *new_rows).token_ids.tolist() == [0, 0]
    assert sample(sampler, logits, [0, 1]).token_ids.tolist() == [1, 2]


def test_presence_and_frequency_look_at_the_output_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.1)
    edited = edit(torch.zeros(1, 5), params, [0, 0, 1], [1, 2, 2])
    torch.testing.assert_close(edited, torch.tensor([0.0, -0.6, -0.7, 0.0, 0.0]))
    assert edit(torch.zeros(1, 5), params, [0, 0, 1], []).tolist() == [0.0] * 5


def test_a_row_without_output_beside_one_with_output() -> None:
    sampler = Sampler(3, 2, SESSION_LEN, "cpu")
    params = SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=2.0)
    new_rows = [new_row(0, params, prompt=[1], output=[2, 2]), new_row(1, params, prompt=[1])]
    logits = torch.tensor([[2.5, 0.5, 1.0]]).repeat(2, 1)
    assert sample(sampler, logits, [0, 1], *new_rows).token_ids.tolist() == [0, 0]
    assert sample(sampler, logits, [1, 0]).token_ids.tolist() == [2, 1]


@pytest.mark.parametrize(("bias", "expected"), [(100.0, 0), (-100.0, 2), (0.5, 1)])
def test_logit_bias_forces_and_forbids(bias: float, expected: int) -> None:
    params = SamplingParams(temperature=0, logit_bias={0 if bias > 0 else 1: bias})
    assert sample_one([0.0, 8.0, 7.0], params) == expected


def test_only_allowed_tokens_are_drawn() -> None:
    params = SamplingParams(allowed_token_ids=[3, 5, 5])
    drawn = {sample_one([50.0] + [0.0] * 9, params, seed=seed) for seed in range(30)}
    assert drawn == {3, 5}


def test_a_vanishing_temperature_is_greedy() -> None:
    logits = [1.0, 1.0001, -300.0, 1.0]
    for temperature in (1e-3 * 1e-3, 1e-30, 5e-324):
        assert sample_one(logits, SamplingParams(temperature=temperature, seed=1)) == 1


# --- log probabilities -----------------------------------------------------------------------


def check_entry(entry: TokenLogprobs | None, logits: Tensor, token_id: int, num_top: int) -> None:
    expected = torch.log_softmax(logits.double(), 0)
    assert entry is not None
    assert entry.token_id == token_id
    assert entry.logprob == pytest.approx(expected[token_id].item(), abs=1e-5)
    assert entry.rank == int((logits > logits[token_id]).sum()) + 1
    best = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))[:num_top]
    assert entry.top_token_ids == best
    assert entry.top_logprobs == pytest.approx(expected[best].tolist(), abs=1e-5)


@pytest.mark.parametrize("vocab_size", [10, 1000])
def test_logprobs_are_those_of_the_model(vocab_size: int) -> None:
    """Whatever the edits: only rows that ask get any, each as many as it asked for."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, vocab_size, generator=generator).mul(3).to(torch.bfloat16).float()
    params = [
        SamplingParams(logprobs=3, temperature=0.5, top_k=5, logit_bias={1: 100.0}),
        SamplingParams(),
        SamplingParams(logprobs=0, repetition_penalty=2.0),
        SamplingParams(logprobs=8, temperature=0),
    ]
    sampler = Sampler(vocab_size, 4, SESSION_LEN, "cpu")
    new_rows = [new_row(row, p, seed=row) for row, p in enumerate(params)]
    result = sample(sampler, logits, [0, 1, 2, 3], *new_rows)
    assert result.logprobs is not None
    assert result.logprobs[1] is None
    for index, num_top in ((0, 3), (2, 0), (3, 8)):
        check_entry(result.logprobs[index], logits[index], result.token_ids[index], num_top)
    assert result.logprobs[3].top_token_ids[0] == result.token_ids[3]  # type: ignore[union-attr]
    assert sample(sampler, logits[1:2], [1]).logprobs is None


def test_prompt_logprobs() -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(6))
    token_ids = torch.arange(7) * 40
    for num_top in (0, 4):
        entries = token_logprobs(logits, token_ids, num_top)
        assert len(entries) == 7
        for entry, row, token_id in zip(entries, logits, token_ids.tolist(), strict=True):
            check_entry(entry, row, token_id, num_top)
    equal = torch.zeros(1, 300)
    equal[0, 10::30] = 1.0  # ten tokens, of which topk alone picks any six
    entry = token_logprobs(equal, torch.tensor([299]), 6)[0]
    assert (entry.rank, entry.top_token_ids) == (11, [10, 40, 70, 100, 130, 160])
    assert len(token_logprobs(torch.zeros(1, 3), torch.tensor([1]), 20)[0].top_token_ids) == 3
    assert token_logprobs(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2) == []


# --- broken logits ---------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocab_size", [20, 600])
def test_one_broken_row_is_reported_and_breaks_no_other(poison: float, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(1, len(MIX), vocab_size, generator=generator)
    whole = run_mix(logits, list(range(len(MIX))), list(range(len(MIX))), 1)[0]
    for broken in range(len(MIX)):
        sampler = Sampler(vocab_size, 8, SESSION_LEN, "cpu")
        table = logits[0].clone()
        if poison == -math.inf:
            table[broken] = poison
        else:
            table[broken, vocab_size // 2] = poison
        rows = [new_row(m, MIX[m], seed=m * 77, prompt=[1, 2, m]) for m in range(len(MIX))]
        result = sample(sampler, table, list(range(len(MIX))), *rows)
        assert result.invalid == [broken]
        assert 0 <= result.token_ids[broken] < vocab_size
        others = [m for m in range(len(MIX)) if m != broken]
        assert result.token_ids[others].tolist() == whole[others].tolist()


def test_a_row_whose_bans_leave_nothing_is_reported() -> None:
    params = SamplingParams(temperature=0, allowed_token_ids=[1], min_tokens=1)
    sampler = Sampler(3, 1, SESSION_LEN, "cpu")
    assert sample(sampler, torch.zeros(1, 3), [0], new_row(0, params, eos=(1,))).invalid == [0]
