"""GpuSampler: one token per row, chosen on the device, without waiting for it.

The same features in the same order as engine/sampler.py. Its draws are Gumbel races instead of an
inverse CDF, so a seed gives other tokens here than on a CPU, and the same ones on every GPU step:
token i of a sequence depends on (seed, i) and its own logits and tokens only.

It owns the request table on the device and what varies in length beside it. All of it is uploaded
in one copy when rows come or the batch's rows change; a step of the same rows uploads nothing.
A row may be given to a new sequence while a step of its former one is under way or its result is
not collected: the record is written after that step in the order of the stream.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import NewRow, SamplingBatch
from engine.gpu_edits import GpuEdits
from engine.gpu_results import PendingLogprobs, PendingTokens, first_entry, launch_logprobs
from engine.host_copies import Download, upload
from engine.sampling_params import SamplingParams
from kernels.gpu.logit_edits import IN_PROMPT, LogitEdits, edit_logits
from kernels.gpu.logprobs import token_logprobs
from kernels.gpu.sampling import CAPACITY, Scratch, sample
from kernels.gpu.sampling_table import RECORD, TAIL_TOKENS, WORDS, allocate_table

__all__ = ["GpuSampler", "PendingLogprobs", "PendingTokens", "launch_logprobs", "peak_bytes"]

Int32Array = NDArray[np.int32]

# (logit - maximum) × 1e30 is 0 or -inf at float32's resolution, never NaN: greedy up to ties.
_MAX_INVERSE_TEMPERATURE = 1e30
_MAX_COUNT = 0x7FFF


_BIASED: dict[str, Any] = {"logit_bias": {0: 1.0}}
_PENALISED = _BIASED | {"repetition_penalty": 1.1}
_LIMITED: dict[str, Any] = {"top_p": 0.9}
# Between them they launch every form of every kernel.
_ALL_FORMS: tuple[dict[str, Any], ...] = (
    {},
    _LIMITED,
    _BIASED,
    _BIASED | _LIMITED | {"bad_words": [[0], [0, 0]]},
    _PENALISED,
    _PENALISED | _LIMITED | {"logprobs": 1},
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a batch's rows ask, rebuilt when the rows change."""

    rows: Int32Array  # [S]
    rows_on_device: Tensor  # int32 [S]
    limits: bool
    edits: LogitEdits | None
    kept_going: bool  # whether the edits hold bans that lapse after min_tokens
    scored_on_device: Tensor | None  # int32 [A]
    scored: list[int]  # [A]
    num_top: list[int]  # [A]


def peak_bytes(vocab_size: int, max_num_seqs: int) -> int:
    """Device memory of a sampler when all rows have edits: gathered tokens, counts, logits."""
    return max_num_seqs * (8 * CAPACITY + 2 * vocab_size + 4 * vocab_size)


class GpuSampler:
    def __init__(
        self, vocab_size: int, max_num_seqs: int, session_len: int, device: torch.device | str
    ) -> None:
        self._vocab_size = vocab_size
        self._session_len = session_len
        self._device = torch.device(device)
        # On the host as on the device, but for the tails, which only the device continues.
        self._requests = np.zeros(max_num_seqs, dtype=RECORD)
        self._num_logprobs = np.full(max_num_seqs, -1, dtype=np.int64)  # -1: not asked
        self._edits = GpuEdits()
        self._table = allocate_table(max_num_seqs, self._device)
        self._counts: Tensor | None = None  # int16 [max_num_seqs, V], see kernels/gpu/logit_edits
        self._scratch = Scratch.allocate(vocab_size, max_num_seqs, self._device)
        self._plan: _Plan | None = None

    @torch.inference_mode()
    def launch(self, logits: Tensor, batch: SamplingBatch, token_pool: Tensor) -> PendingTokens:
        """Start choosing a token for each of batch.rows; also into int32 token_pool[row].

        logits [S or more, V] in bfloat16, float16 or float32 are only read; rows beyond S are
        padding.
        """
        for new in batch.new_rows:
            self._admit(new)
        if self._needs_plan(batch):
            self._plan = self._make_plan(batch.new_rows, batch.rows.copy())
        plan = self._plan
        assert plan is not None
        num_rows = len(plan.rows)
        if num_rows == 0:
            nothing = torch.empty(0, dtype=torch.int32, device=self._device)
            return PendingTokens(Download.start(nothing), 0, [], [])
        assert logits.shape[1] == self._vocab_size, logits.shape
        edited, counts = logits, None
        if plan.edits is not None:
            counts = self._counts if plan.edits.penalties else None
            edited = edit_logits(logits, plan.rows_on_device, self._table, counts, plan.edits)
        num_top = max(plan.num_top, default=0)
        entry_size = 3 + 2 * num_top
        start = first_entry(num_rows)
        size = start + len(plan.scored) * entry_size
        result = torch.empty(size, dtype=torch.int32, device=self._device)
        chosen = result[: 2 * num_rows].view(2, num_rows)
        sample(
            edited,
            plan.rows_on_device,
            self._table,
            counts,
            self._scratch,
            token_pool,
            chosen,
            plan.limits,
        )
        if plan.scored_on_device is not None:
            entries = result[start:].view(-1, entry_size)
            token_logprobs(logits, plan.scored_on_device, chosen[0], num_top, entries)
        self._requests["num_outputs"][plan.rows] += 1
        return PendingTokens(Download.start(result), num_rows, plan.scored, plan.num_top)

    def warm_up(self, logits: Tensor, token_pool: Tensor) -> None:
        """Compile whatever requests may ask for, on logits [1 or more, V] of the type to come.

        Draws in row 0, which is written anew for the sequence that gets it.
        """
        for asked in _ALL_FORMS:
            new = NewRow(0, SamplingParams(**asked), 0, (), [0], [])
            batch = SamplingBatch([new], np.zeros(1, dtype=np.int32))
            self.launch(logits, batch, token_pool).get()
        launch_logprobs(logits, torch.zeros(1, dtype=torch.int32), 1).get()

    def _admit(self, new: NewRow) -> None:
        params = new.params
        token_ids = new.prompt_token_ids + new.output_token_ids
        assert len(token_ids) <= self._session_len, (new.row, len(token_ids))
        scale = 0.0 if params.greedy else min(1.0 / params.temperature, _MAX_INVERSE_TEMPERATURE)
        record = self._requests[new.row]
        record["seed"] = new.seed & 0xFFFFFFFFFFFFFFFF
        record["top_p"] = params.top_p
        record["top_k"] = (
            min(params.top_k, self._vocab_size) if params.top_k > 0 else (self._vocab_size)
        )
        record["min_p"] = params.min_p
        record["inverse_temperature"] = scale
        record["repetition"] = params.repetition_penalty
        record["presence"] = params.presence_penalty
        record["frequency"] = params.frequency_penalty
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        record["penalised"] = penalties != (1.0, 0.0, 0.0)
        record["min_tokens"] = params.min_tokens
        record["only_allowed"] = params.allowed_token_ids is not None
        record["num_prompt"] = len(new.prompt_token_ids)
        record["num_outputs"] = len(new.output_token_ids)
        first = max(0, len(token_ids) - TAIL_TOKENS)
        record["tail"][np.arange(first, len(token_ids)) % TAIL_TOKENS] = token_ids[first:]
        self._num_logprobs[new.row] = -1 if params.logprobs is None else params.logprobs
        self._edits.admit(new)

    def _needs_plan(self, batch: SamplingBatch) -> bool:
        plan = self._plan
        if plan is None or batch.new_rows or not np.array_equal(batch.rows, plan.rows):
            return True
        return plan.kept_going and bool(self._may_end(plan.rows).all())

    def _may_end(self, rows: Int32Array) -> NDArray[np.bool_]:
        may_end: NDArray[np.bool_] = (
            self._requests["num_outputs"][rows] >= self._requests["min_tokens"][rows]
        )
        return may_end

    def _make_plan(self, new_rows: list[NewRow], rows: Int32Array) -> _Plan:
        """Upload what the device needs for a batch of these rows, and the records of new ones."""
        requests = self._requests[rows]
        may_end = self._may_end(rows)
        packed = self._edits.pack(rows.tolist(), may_end)
        counted = [new for new in new_rows if self._requests[new.row]["penalised"]]
        counts = [_count(new, self._vocab_size) for new in counted]
        scored = np.flatnonzero(self._num_logprobs[rows] >= 0).astype(np.int32)
        names = np.array([new.row for new in new_rows], dtype=np.int32)
        arrays = [
            rows,
            scored,
            packed.set_entries,
            packed.ban_entries,
            packed.words,
            packed.word_tokens,
            names,
            self._requests[names].view(np.int32).reshape(len(names), WORDS.value),
            *counts,
        ]
        on_device = upload(arrays, self._device)
        sets, bans, words, word_tokens, new_on_device, records = on_device[2:8]
        if len(new_rows) > 0:
            self._table.index_copy_(0, new_on_device.to(torch.int64), records)
        for new, pairs in zip(counted, on_device[8:], strict=True):
            self._write_counts(new.row, pairs)
        penalties = bool(requests["penalised"].any())
        edits = LogitEdits(
            penalties=penalties,
            set_entries=sets if sets.numel() > 0 else None,
            ban_entries=bans if bans.numel() > 0 else None,
            words=words if words.numel() > 0 else None,
            word_tokens=word_tokens if words.numel() > 0 else None,
        )
        return _Plan(
            rows=rows,
            rows_on_device=on_device[0],
            limits=bool(_is_limited(requests, self._vocab_size).any()),
            edits=edits if packed or penalties else None,
            kept_going=bool(packed.ban_entries[2].any()),
            scored_on_device=on_device[1] if len(scored) > 0 else None,
            scored=scored.tolist(),
            num_top=np.minimum(self._num_logprobs[rows[scored]], self._vocab_size).tolist(),
        )

    def _write_counts(self, row: int, pairs: Tensor) -> None:
        """Replace a row's counts; pairs int32 [2, n] of token ids, each once, and counts."""
        if self._counts is None:
            shape = (len(self._requests), self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int16, device=self._device)
        counts = self._counts[row].zero_()
        counts.index_copy_(0, pairs[0].to(torch.int64), pairs[1].to(torch.int16))


def _is_limited(requests: NDArray[np.void], vocab_size: int) -> NDArray[np.bool_]:
    ranked = (requests["top_k"] < vocab_size) | (requests["top_p"] < 1.0)
    limited: NDArray[np.bool_] = (ranked | (requests["min_p"] > 0.0)) & (
        requests["inverse_temperature"] > 0.0
    )
    return limited


def _count(new: NewRow, vocab_size: int) -> Int32Array:
    """Token ids that occur, and their counts as kernels/gpu/logit_edits.py reads them: [2, n]."""
    output = np.array(new.output_token_ids, dtype=np.int64)
    counts = np.minimum(np.bincount(output, minlength=vocab_size), _MAX_COUNT)
    counts[new.prompt_token_ids] += IN_PROMPT
    token_ids = np.flatnonzero(counts)
    return np.stack([token_ids, counts[token_ids]]).astype(np.int32)
