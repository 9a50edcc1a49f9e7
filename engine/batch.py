"""Batch: one step's work as flat int32 arrays in one buffer, the only thing ranks exchange.

Rows of the batch are sequences, decode rows (one new token) first. All arrays are views into
`buffer`, so that a step is one host-to-device copy or one broadcast. What only the sampling rank
needs travels beside it in Sampling.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.scheduled_batch import ScheduledBatch

Int32Array = NDArray[np.int32]
PENDING = -1  # an input id the host does not know yet: the step before samples it
_HEADER = 6  # num_tokens, num_seqs, num_blocks, num_logits, num_sampled, num_decodes


@dataclass(frozen=True, slots=True)
class Batch:
    """One step for every rank. T tokens, S sequences, B blocks in the longest table, L logits."""

    buffer: Int32Array
    input_ids: Int32Array  # [T] or PENDING
    positions: Int32Array  # [T]
    slot_mapping: Int32Array  # [T] block_id * block_size + offset: where each token's KV goes
    rows: Int32Array  # [S] request-table rows
    query_start_loc: Int32Array  # [S+1] prefix sums of new tokens
    context_lens: Int32Array  # [S] KV length including the new tokens
    block_tables: Int32Array  # [S, B]; entries past a sequence's own blocks are arbitrary ids
    logit_indices: Int32Array  # [L] tokens whose logits are wanted: to sample, then to score
    num_sampled: int
    num_decodes: int  # the first rows, those that have exactly one new token

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.rows)

    @classmethod
    def unpack(cls, buffer: Int32Array) -> "Batch":
        """The batch whose arrays view `buffer`: the header, then the arrays in field order."""
        tokens, seqs, blocks, logits, num_sampled, num_decodes = buffer[:_HEADER].tolist()
        arrays: list[Int32Array] = []
        end = _HEADER
        for size in (tokens, tokens, tokens, seqs, seqs + 1, seqs, seqs * blocks, logits):
            arrays.append(buffer[end : end + size])
            end += size
        ids, positions, slots, rows, starts, lens, tables, indices = arrays
        return cls(
            buffer=buffer,
            input_ids=ids,
            positions=positions,
            slot_mapping=slots,
            rows=rows,
            query_start_loc=starts,
            context_lens=lens,
            block_tables=tables.reshape(seqs, blocks),
            logit_indices=indices,
            num_sampled=num_sampled,
            num_decodes=num_decodes,
        )

    @classmethod
    def build(
        cls,
        scheduled: "ScheduledBatch",
        block_tables: Int32Array,
        block_size: int,
        scores: "list[PromptScore]",
    ) -> "Batch":
        """Flatten what was scheduled; `block_tables` is the scheduler's, indexed by row."""
        num_new = np.array(scheduled.num_new_tokens, dtype=np.int32)
        rows = np.array([seq.row for seq in scheduled.seqs], dtype=np.int32)
        ends = np.array([seq.num_computed_tokens for seq in scheduled.seqs], dtype=np.int32)
        query_ends = np.cumsum(num_new, dtype=np.int32)
        num_scored = sum(len(score.token_ids) for score in scores)
        batch = cls._allocate(
            tokens=int(query_ends[-1]),
            seqs=len(rows),
            blocks=-(-int(ends.max()) // block_size),
            logits=len(scheduled.sampled) + num_scored,
            num_sampled=len(scheduled.sampled),
            num_decodes=scheduled.num_decodes,
        )
        batch.input_ids[:] = _input_ids(scheduled)
        batch.positions[:] = np.arange(batch.num_tokens) - np.repeat(query_ends - ends, num_new)
        block_of_token = block_tables[np.repeat(rows, num_new), batch.positions // block_size]
        batch.slot_mapping[:] = block_of_token * block_size + batch.positions % block_size
        batch.rows[:] = rows
        batch.query_start_loc[0] = 0
        batch.query_start_loc[1:] = query_ends
        batch.context_lens[:] = ends
        batch.block_tables[:] = block_tables[rows, : batch.block_tables.shape[1]]
        batch.logit_indices[: batch.num_sampled] = query_ends[scheduled.sampled] - 1
        if scores:
            scored = [np.arange(s.start, s.start + len(s.token_ids)) for s in scores]
            batch.logit_indices[batch.num_sampled :] = np.concatenate(scored)
        return batch

    @classmethod
    def _allocate(
        cls, *, tokens: int, seqs: int, blocks: int, logits: int, num_sampled: int, num_decodes: int
    ) -> "Batch":
        size = _HEADER + 3 * tokens + 3 * seqs + 1 + seqs * blocks + logits
        buffer = np.empty(size, dtype=np.int32)
        buffer[:_HEADER] = tokens, seqs, blocks, logits, num_sampled, num_decodes
        return cls.unpack(buffer)


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence that entered the running set: what the sampler must know of it from now on."""

    row: int  # request-table row, reused after the sequence ends
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]  # empty when ignored
    prompt_token_ids: list[int]
    output_token_ids: list[int]  # not empty after preemption or resume


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Which rows draw a token in this step."""

    new_rows: list[NewRow]
    rows: Int32Array  # [S] request-table row of each row of logits


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Prompt tokens to score in this step: logits of token start + i predict token_ids[i]."""

    seq_index: int  # row of the batch
    start: int  # index of the first predicting token in the batch
    token_ids: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the sampling rank (0) needs besides the batch."""

    batch: SamplingBatch
    scores: list[PromptScore]

    @classmethod
    def build(cls, scheduled: "ScheduledBatch") -> "Sampling":
        new_rows = [
            NewRow(
                row=seq.row,
                params=seq.params,
                seed=seq.seed,
                eos_token_ids=() if seq.params.ignore_eos else seq.request.eos_token_ids,
                prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
                output_token_ids=seq.output_token_ids,
            )
            for seq in scheduled.new_rows
        ]
        rows = np.array([scheduled.seqs[i].row for i in scheduled.sampled], dtype=np.int32)
        return cls(SamplingBatch(new_rows, rows), _prompt_scores(scheduled))


def _input_ids(scheduled: "ScheduledBatch") -> list[int]:
    decodes = scheduled.num_decodes
    input_ids = [
        seq.token_ids[end - 1]
        if (end := seq.num_computed_tokens) <= len(seq.token_ids)
        else PENDING
        for seq in scheduled.seqs[:decodes]
    ]
    for seq, num_new in zip(
        scheduled.seqs[decodes:], scheduled.num_new_tokens[decodes:], strict=True
    ):
        end = seq.num_computed_tokens
        input_ids += seq.token_ids[end - num_new : end]
    return input_ids


def _prompt_scores(scheduled: "ScheduledBatch") -> list[PromptScore]:
    scores: list[PromptScore] = []
    query_start = 0
    for index, (seq, num_new) in enumerate(
        zip(scheduled.seqs, scheduled.num_new_tokens, strict=True)
    ):
        if seq.params.prompt_logprobs is not None:
            start = seq.num_computed_tokens - num_new
            first = max(start, len(seq.prompt_logprobs))  # a recompute scores nothing twice
            token_ids = seq.token_ids[
                first + 1 : min(seq.num_computed_tokens + 1, seq.num_prompt_tokens)
            ]
            if token_ids:
                scores.append(
                    PromptScore(
                        index,
                        query_start + first - start,
                        token_ids,
                        seq.params.prompt_logprobs,
                    )
                )
        query_start += num_new
    return scores
