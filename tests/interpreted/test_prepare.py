"""Batch preparation and embedding: what the host would have computed, for any mix of rows."""

import random

import numpy as np
import pytest
import torch

from engine.batch import HEADER, PENDING, Batch, Int32Array, buffer_size, table_width
from engine.block_tables import BlockTables
from kernels.embedding import embed
from kernels.gpu import prepare
from kernels.gpu.prepare import StepTensors

MAX_SEQS, MAX_TOKENS, SESSION_LEN, BLOCK_SIZE = 9, 600, 96, 4
WIDTH = table_width(SESSION_LEN, BLOCK_SIZE)


def make_batch(rng: random.Random, num_decodes: int, chunks: list[int], changes: int) -> Batch:
    num_seqs = num_decodes + len(chunks)
    num_new = [1] * num_decodes + chunks
    batch = Batch.allocate(
        tokens=sum(num_new),
        seqs=num_seqs,
        logits=num_seqs,
        changes=changes,
        num_sampled=num_seqs,
        num_decodes=num_decodes,
    )
    batch.input_ids[:] = [rng.choice([PENDING, rng.randrange(100)]) for _ in batch.input_ids]
    batch.rows[:] = rng.sample(range(MAX_SEQS), num_seqs)
    batch.query_start_loc[:] = np.cumsum([0, *num_new])
    batch.context_lens[:] = [rng.randint(n, SESSION_LEN) for n in num_new]
    batch.logit_indices[:] = batch.query_start_loc[1:] - 1
    batch.table_entries[:] = rng.sample(range(MAX_SEQS * WIDTH), changes)
    batch.table_block_ids[:] = [rng.randrange(1, 1000) for _ in range(changes)]
    return batch


def allocate() -> StepTensors:
    size = buffer_size(MAX_TOKENS, MAX_SEQS, MAX_SEQS, MAX_SEQS * WIDTH)
    tensors = StepTensors.allocate(MAX_TOKENS, MAX_SEQS, WIDTH, size, "cpu")
    tensors.token_pool[:] = torch.arange(1000, 1000 + MAX_SEQS)
    return tensors


@pytest.mark.parametrize(
    ("num_decodes", "chunks", "padding"),
    [(1, [], 0), (5, [], 3), (0, [7], 0), (3, [2, 90, 31, 5], 0), (1, [96, 96, 96, 2], 0)],
)
def test_a_step_is_what_the_host_would_have_computed(
    num_decodes: int, chunks: list[int], padding: int
) -> None:
    assert prepare.HEADER.value == HEADER
    rng = random.Random(num_decodes)
    tensors, tables = allocate(), BlockTables(MAX_SEQS, SESSION_LEN, BLOCK_SIZE)
    for changes in (MAX_SEQS * WIDTH, 0, 3):
        batch = make_batch(rng, num_decodes, chunks, changes)
        places = tables.advance(batch)
        tensors.batch[: len(batch.buffer)] = torch.from_numpy(batch.buffer)
        for outputs in (tensors.input_ids, tensors.positions, tensors.slot_mapping, tensors.rows):
            outputs.fill_(-77)
        num_tokens, num_seqs = batch.num_tokens, batch.num_seqs
        step = prepare.prepare(
            tensors,
            num_tokens=num_tokens + padding,
            num_seqs=num_seqs + padding,
            num_decodes=num_decodes + padding,
            max_query_len=max(chunks, default=0),
            max_context_len=SESSION_LEN,
            block_size=BLOCK_SIZE,
        )
        rows = np.repeat(batch.rows, np.diff(batch.query_start_loc))
        ids = np.where(batch.input_ids == PENDING, 1000 + rows, batch.input_ids)
        zeros, minus = [0] * padding, [-1] * padding
        same(step.input_ids, ids, zeros)
        same(step.positions, places.positions, zeros)
        same(step.slot_mapping, places.slot_mapping, minus)
        same(step.query_start_loc, batch.query_start_loc, [num_tokens] * padding)
        same(step.context_lens, batch.context_lens, zeros)
        same(step.rows, batch.rows, zeros)
        assert tensors.rows[num_seqs + padding :].tolist() == [-77] * (
            MAX_SEQS - num_seqs - padding
        )


def same(found: torch.Tensor, expected: Int32Array, padding: list[int]) -> None:
    assert found.tolist() == expected.tolist() + padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_copies_rows_and_leaves_zeros_for_other_ranks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(30, 1100).to(dtype)
    ids = torch.tensor([0, 29, 3, 3, 17], dtype=torch.int32)
    assert torch.equal(embed(ids, table), table[ids])
    part = embed(ids, table[10:20], first=10)
    assert torch.equal(part[4], table[17])
    assert part[:4].count_nonzero() == 0
