"""Batch: one step's work as flat int32 arrays in one buffer, the only thing ranks exchange.

Rows of the batch are sequences, decode rows (one new token) first. All arrays are views into
`buffer`, so that a step is one host-to-device copy or one broadcast. Every worker keeps the block
tables (engine/block_tables.py): a batch names the entries that changed since the one before, and
positions and slots follow from that. What only the sampling rank needs travels beside it in
Sampling.
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
HEADER = 6  # num_tokens, num_seqs, num_logits, num_changes, num_sampled, num_decodes


@dataclass(frozen=True, slots=True)
class Batch:
    """One step for every rank. T tokens, S sequences, L logits, C changes of block tables."""

    buffer: Int32Array
    input_ids: Int32Array  # [T] or PENDING
    rows: Int32Array  # [S] request-table rows
    query_start_loc: Int32Array  # [S+1] prefix sums of new tokens
    context_lens: Int32Array  # [S] KV length including the new tokens
    logit_indices: Int32Array  # [L] tokens whose logits are wanted: to sample, then to score
    table_entries: Int32Array  # [C] row * table width + index, each once
    table_block_ids: Int32Array  # [C] what is there from this step on
    num_sampled: int
    num_decodes: int  # the first rows, those that have exactly one new token

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.rows)

    @property
    def place_of_logit_indices(self) -> slice:
        """In the buffer, for whoever has a copy of it elsewhere."""
        start = HEADER + self.num_tokens + 3 * self.num_seqs + 1
        return slice(start, start + len(self.logit_indices))

    @classmethod
    def unpack(cls, buffer: Int32Array) -> "Batch":
        """The batch whose arrays view `buffer`: the header, then the arrays in field order."""
        tokens, seqs, logits, changes, num_sampled, num_decodes = buffer[:HEADER].tolist()
        arrays: list[Int32Array] = []
        end = HEADER
        for size in (tokens, seqs, seqs + 1, seqs, logits, changes, changes):
            arrays.append(buffer[end : end + size])
            end += size
        ids, rows, starts, lens, indices, entries, block_ids = arrays
        return cls(
            buffer=buffer,
            input_ids=ids,
            rows=rows,
            query_start_loc=starts,
            context_lens=lens,
            logit_indices=indices,
            table_entries=entries,
            table_block_ids=block_ids,
            num_sampled=num_sampled,
            num_decodes=num_decodes,
        )

    @classmethod
    def build(cls, scheduled: "ScheduledBatch", scores: "list[PromptScore]") -> "Batch":
        """Flatten what was scheduled."""
        seqs, sampled = scheduled.seqs, scheduled.sampled
        input_ids = _input_ids(scheduled)
        changes = scheduled.table_changes
        num_scored = sum(len(score.token_ids) for score in scores)
        batch = cls.allocate(
            tokens=len(input_ids),
            seqs=len(seqs),
            logits=len(sampled) + num_scored,
            changes=len(changes),
            num_sampled=len(sampled),
            num_decodes=scheduled.num_decodes,
        )
        batch.input_ids[:] = input_ids
        batch.rows[:] = [seq.row for seq in seqs]
        batch.query_start_loc[0] = 0
        np.cumsum(scheduled.num_new_tokens, out=batch.query_start_loc[1:])
        batch.context_lens[:] = [seq.num_computed_tokens for seq in seqs]
        batch.logit_indices[: len(sampled)] = batch.query_start_loc[1:][sampled] - 1
        if scores:
            scored = [np.arange(s.start, s.start + len(s.token_ids)) for s in scores]
            batch.logit_indices[len(sampled) :] = np.concatenate(scored)
        if changes:
            batch.table_entries[:] = list(changes)
            batch.table_block_ids[:] = list(changes.values())
        return batch

    @classmethod
    def allocate(
        cls,
        *,
        tokens: int,
        seqs: int,
        logits: int,
        changes: int,
        num_sampled: int,
        num_decodes: int,
    ) -> "Batch":
        """A batch of these sizes whose arrays are not filled yet."""
        buffer = np.empty(buffer_size(tokens, seqs, logits, changes), dtype=np.int32)
        buffer[:HEADER] = tokens, seqs, logits, changes, num_sampled, num_decodes
        return cls.unpack(buffer)


def buffer_size(tokens: int, seqs: int, logits: int, changes: int) -> int:
    return HEADER + tokens + 3 * seqs + 1 + logits + 2 * changes


def table_width(session_len: int, block_size: int) -> int:
    """Entries of a block table: enough for the longest sequence."""
    return -(-session_len // block_size)


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
