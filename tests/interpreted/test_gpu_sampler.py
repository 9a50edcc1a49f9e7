"""The GPU sampler over steps: log probabilities, rows that change hands, seeds, uploads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import NewRow, SamplingBatch
from engine.gpu_sampler import GpuSampler, launch_logprobs
from engine.host_copies import Download, upload
from engine.logprobs import token_logprobs
from engine.sampling_params import SamplingParams
from tests.interpreted.sampling_harness import SESSION_LEN, Sampling, new_row, sample_rows

# --- log probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 3000) * 2).to(dtype)
    logits[2] = logits[2].round()
    logits[3, 20:] = -torch.inf
    params = [
        SamplingParams(logprobs=2, logit_bias={7: 100.0}),
        SamplingParams(),
        SamplingParams(logprobs=20, temperature=0.0),
        SamplingParams(logprobs=0),
    ]
    result = Sampling(3000, 4)(logits, range(4), *[new_row(i, p) for i, p in enumerate(params)])
    assert result.token_ids[0] == 7
    assert result.logprobs is not None
    expected = token_logprobs(logits.float(), torch.from_numpy(result.token_ids), 20)
    in_order = logits.float().sort(dim=1, descending=True, stable=True).indices.tolist()
    for i, num_top in enumerate((2, None, 20, 0)):
        entry, wanted = result.logprobs[i], expected[i]
        if num_top is None:
            assert entry is None
            continue
        assert entry is not None
        assert (entry.token_id, entry.rank) == (wanted.token_id, wanted.rank)
        assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-5)
        assert entry.top_token_ids == in_order[i][:num_top]
        assert entry.top_logprobs == pytest.approx(wanted.top_logprobs[:num_top], abs=1e-5)


def test_scores_of_given_tokens() -> None:
    logits = torch.randn(5, 2500)
    token_ids = torch.tensor([0, 2499, 17, 5, 2048])
    scores = launch_logprobs(logits, token_ids, 3).get()
    log_softmax = logits.double().log_softmax(1)
    best = log_softmax.topk(3, dim=1)
    for i, entry in enumerate(scores):
        assert entry.token_id == token_ids[i]
        assert entry.logprob == pytest.approx(float(log_softmax[i, token_ids[i]]), abs=1e-5)
        assert entry.rank == 1 + int((logits[i] > logits[i, token_ids[i]]).sum())
        assert entry.top_token_ids == best.indices[i].tolist()
    assert launch_logprobs(logits[:0], token_ids[:0], 3).get() == []
    (entry,) = launch_logprobs(torch.zeros(1, 7), torch.tensor([4]), 20).get()
    assert entry.top_token_ids == list(range(7))


# --- rows, steps and seeds --------------------------------------------------------------------


def test_a_sequence_does_not_depend_on_its_row_or_batch_or_on_interruptions() -> None:
    params = SamplingParams(
        top_p=0.9, repetition_penalty=1.3, bad_words=[[4, 5], [6]], min_tokens=4, temperature=1.5
    )
    steps = torch.randn(6, 1, 40, generator=torch.Generator().manual_seed(3))
    alone, tokens = Sampling(40, 1), []
    for i, logits in enumerate(steps):
        new = [new_row(0, params, seed=77, prompt=[3, 4], eos=(9,))] if i == 0 else []
        tokens.append(int(alone(logits, [0], *new).token_ids[0]))
    shared = Sampling(40, 4)
    others = [new_row(0, SamplingParams(), seed=1), new_row(3, SamplingParams(top_k=3), seed=2)]
    again: list[int] = []
    for i, logits in enumerate(steps):
        rows = [0, 2, 3] if i < 3 else [1, 3]  # preempted after three tokens
        new = others if i == 0 else []
        if i in (0, 3):
            resumed = {"seed": 77, "prompt": [3, 4], "output": list(again), "eos": (9,)}
            new = [*new, new_row(2 if i == 0 else 1, params, **resumed)]
        batch = torch.randn(len(rows), 40)
        index = 1 if i < 3 else 0
        batch[index] = logits[0]
        again.append(int(shared(batch, rows, *new).token_ids[index]))
    assert again == tokens


def test_a_step_wasted_on_a_finished_sequence_does_not_touch_the_next_one_of_its_row() -> None:
    """Two steps are launched before the first result is read; then the row changes hands."""
    first = SamplingParams(frequency_penalty=2.0, bad_words=[[1, 2, 3]], min_tokens=30)
    second = SamplingParams(repetition_penalty=1.7, bad_words=[[5, 6]], min_tokens=1, logprobs=1)
    steps = torch.randn(6, 1, 20, generator=torch.Generator().manual_seed(4)) * 2
    rows = np.array([0], dtype=np.int32)

    def launch(sampler: GpuSampler, pool: Tensor, logits: Tensor, *new: NewRow) -> Any:
        return sampler.launch(logits, SamplingBatch(list(new), rows), pool)

    successor = new_row(0, second, seed=5, prompt=[5, 5])
    pool, sampler = torch.zeros(1, dtype=torch.int32), GpuSampler(20, 1, SESSION_LEN, "cpu")
    pending = [launch(sampler, pool, steps[0], new_row(0, first, seed=4, prompt=[1, 2]))]
    pending.append(launch(sampler, pool, steps[1]))  # wasted
    pending += [launch(sampler, pool, steps[2], successor)]
    pending += [launch(sampler, pool, logits) for logits in steps[3:]]
    results = [step.get() for step in pending]

    fresh = GpuSampler(20, 1, SESSION_LEN, "cpu")
    expected = [launch(fresh, pool, steps[2], successor).get()]
    expected += [launch(fresh, pool, logits).get() for logits in steps[3:]]
    assert [r.token_ids.tolist() for r in results[2:]] == [e.token_ids.tolist() for e in expected]
    assert [r.logprobs for r in results[2:]] == [e.logprobs for e in expected]
    assert all(r.logprobs is None for r in results[:2])


def test_each_row_may_end_after_its_own_min_tokens() -> None:
    """On the device: the host uploads nothing while one of the rows must go on."""
    sampler, logits = Sampling(20, 2), torch.zeros(2, 20)
    logits[:, 4], logits[:, 7] = 9.0, 5.0
    params = [SamplingParams(temperature=0.0, min_tokens=number) for number in (1, 3)]
    new = [new_row(row, each, eos=(4,)) for row, each in enumerate(params)]
    steps = [sampler(logits, [0, 1], *(new if i == 0 else [])) for i in range(4)]
    assert [step.token_ids.tolist() for step in steps] == [[7, 7], [4, 7], [4, 7], [4, 4]]


def test_a_step_without_rows_admits_all_the_same() -> None:
    sampler = Sampling(20, 2)
    assert len(sampler(torch.zeros(0, 20), [], new_row(1, SamplingParams(), seed=9)).token_ids) == 0
    logits = torch.randn(1, 20)
    assert sampler(logits, [1]).token_ids.tolist() == sample_rows(logits, SamplingParams(), [9])


def test_a_step_without_rows_is_waited_for_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all chunks of a long prompt would be launched at once, and nothing come between."""
    waits = 0

    def counted(self: Download) -> NDArray[np.int32]:
        nonlocal waits
        waits += 1
        array: NDArray[np.int32] = self.host.numpy()
        return array

    monkeypatch.setattr(Download, "get", counted)
    sampler = Sampling(20, 2)
    assert len(sampler(torch.zeros(0, 20), [], new_row(1, SamplingParams())).token_ids) == 0
    assert waits == 1


def test_warming_up_leaves_no_trace() -> None:
    logits, pool = torch.randn(2, 20), torch.zeros(2, dtype=torch.int32)
    new = [
        new_row(row, SamplingParams(presence_penalty=2.0, top_p=0.7), seed=row) for row in (0, 1)
    ]
    results = []
    for warm in (False, True):
        sampler = GpuSampler(20, 2, SESSION_LEN, "cpu")
        if warm:
            sampler.warm_up(logits, pool)
        batches = [SamplingBatch(rows, np.arange(2, dtype=np.int32)) for rows in (new, [], [])]
        steps = [sampler.launch(logits, batch, pool).get() for batch in batches]
        results.append([step.token_ids.tolist() for step in steps])
    assert results[0] == results[1]


def test_steps_of_the_same_rows_upload_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampling(20, 3)
    params = SamplingParams(min_tokens=3, presence_penalty=1.0, logit_bias={3: 1.0})
    sampler(torch.randn(2, 20), [0, 2], new_row(0, params, eos=(4,)), new_row(2, params, eos=(4,)))
    uploads = 0

    def counted(arrays: Sequence[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
        nonlocal uploads
        uploads += 1
        return upload(arrays, device)

    monkeypatch.setattr("engine.gpu_sampler.upload", counted)
    for _ in range(5):
        sampler(torch.randn(2, 20), [0, 2])
    assert uploads == 1  # when min_tokens are reached
