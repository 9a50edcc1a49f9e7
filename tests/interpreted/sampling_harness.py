"""A GPU sampler that answers at once, for the tests of tests/interpreted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import NewRow, SamplingBatch
from engine.gpu_sampler import GpuSampler
from engine.sampler import SampledTokens
from engine.sampling_params import SamplingParams
from tests.interpreted.reading import reading_nothing

SESSION_LEN = 128


def new_row(row: int, params: SamplingParams, **fields: Any) -> NewRow:
    return NewRow(
        row,
        params,
        fields.get("seed", 0),
        fields.get("eos", ()),
        fields.get("prompt", [0]),
        fields.get("output", []),
    )


class Sampling:
    """A sampler that answers at once."""

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self.pool = torch.full((max_num_seqs,), -7, dtype=torch.int32)
        self._sampler = GpuSampler(vocab_size, max_num_seqs, SESSION_LEN, "cpu")

    def __call__(self, logits: Tensor, rows: Sequence[int], *new: NewRow) -> SampledTokens:
        batch = SamplingBatch(list(new), np.array(rows, dtype=np.int32))
        launch = reading_nothing(self._sampler.launch)
        result = launch(logits, batch, self.pool).get()
        assert self.pool[list(rows)].tolist() == result.token_ids.tolist()
        return result


def sample_rows(logits: Tensor, params: SamplingParams, seeds: Sequence[int]) -> list[int]:
    """Tokens of independent sequences, one per row of logits; that of row i has i % 8 outputs."""
    sampler = Sampling(logits.shape[1], len(logits))
    new = [new_row(i, params, seed=seed, output=[0] * (i % 8)) for i, seed in enumerate(seeds)]
    return list(map(int, sampler(logits, range(len(logits)), *new).token_ids))
