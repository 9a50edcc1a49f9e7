"""Sampler: logits in, one token per row out, all rows in one pass.

Order: raw log probabilities (engine/logprobs.py) → edits (engine/logit_edits.py) → temperature →
top_k → top_p → min_p → draw (engine/draw.py); temperature 0 takes the most likely token after
the edits. Token i of a sequence is drawn with uniform(seed, i), so batch-mates, the row, and a
resume with known output tokens change nothing.

It owns the request table: what each row asks and how many tokens it has; when a row is given to
another sequence is the scheduler's business.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import NewRow, SamplingBatch
from engine.draw import Limits, RankLimits, argmax, draw, weigh_
from engine.logit_edits import LogitEdits
from engine.logprobs import token_logprobs
from engine.outputs import TokenLogprobs
from engine.philox import uniforms

__all__ = ["SampledTokens", "Sampler", "token_logprobs"]

Int64Array = NDArray[np.int64]

_REQUEST = np.dtype(
    [
        ("seed", np.uint64),
        ("inverse_temperature", np.float32),  # 0 for greedy
        ("top_k", np.int64),  # vocab_size when off
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("num_logprobs", np.int64),  # -1 when not asked
    ]
)
# (logit - max) × 1e30 is 0 or -inf at float32's resolution, never NaN: greedy up to ties.
_MAX_INVERSE_TEMPERATURE = 1e30


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per row. S rows."""

    token_ids: NDArray[np.int32]  # [S]
    logprobs: list[TokenLogprobs | None] | None = None  # [S]; None when no row asked
    # Rows whose logits held NaN or +inf, or whose bans left no token: their token is arbitrary.
    invalid: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Draws:
    """The G rows of a batch that draw."""

    indices: Int64Array  # [G] in the batch
    seeds: NDArray[np.uint64]  # [G]
    inverse_temperature: Tensor | None  # [G, 1], None when all are 1
    limits: Limits


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a batch's rows ask, rebuilt when the rows change."""

    rows: Int64Array  # [S]
    draws: _Draws | None  # None when all rows are greedy
    scored: Int64Array  # [A] batch rows that want log probabilities
    num_top: list[int]  # [A]


class Sampler:
    def __init__(self, vocab_size: int, max_num_seqs: int, session_len: int, device: str) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._requests = np.zeros(max_num_seqs, dtype=_REQUEST)
        self._num_outputs = np.zeros(max_num_seqs, dtype=np.int64)
        self._edits = LogitEdits(vocab_size, max_num_seqs, session_len, device)
        self._plan: _Plan | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """One token per row of float32 logits [S, V], which are overwritten."""
        for new in batch.new_rows:
            self._admit(new)
        if self._plan is None or batch.new_rows or not np.array_equal(batch.rows, self._plan.rows):
            self._plan = self._make_plan(batch.rows.astype(np.int64))
        plan = self._plan
        if len(plan.rows) == 0:
            return SampledTokens(np.zeros(0, dtype=np.int32))
        assert logits.shape == (len(plan.rows), self._vocab_size), logits.shape
        scored = logits[self._tensor(plan.scored)] if len(plan.scored) > 0 else None
        num_outputs = self._num_outputs[plan.rows]
        logits = logits.contiguous()
        self._edits.apply(logits, num_outputs)
        token_ids, valid = self._choose(logits, plan.draws, num_outputs)
        self._edits.append(token_ids, num_outputs)
        self._num_outputs[plan.rows] += 1
        on_host = torch.stack([token_ids, valid.to(torch.int64)]).cpu().numpy()
        return SampledTokens(
            token_ids=on_host[0].astype(np.int32),
            logprobs=None if scored is None else self._score(scored, token_ids, plan),
            invalid=np.flatnonzero(on_host[1] == 0).tolist(),
        )

    def _admit(self, new: NewRow) -> None:
        params = new.params
        scale = 0.0 if params.greedy else min(1.0 / params.temperature, _MAX_INVERSE_TEMPERATURE)
        top_k = params.top_k if params.top_k > 0 else self._vocab_size
        self._requests[new.row] = (
            new.seed & 0xFFFFFFFFFFFFFFFF,
            scale,
            min(top_k, self._vocab_size),
            params.top_p,
            params.min_p,
            -1 if params.logprobs is None else params.logprobs,
        )
        self._num_outputs[new.row] = len(new.output_token_ids)
        self._edits.admit(new)

    def _make_plan(self, rows: Int64Array) -> _Plan:
        self._edits.select(rows)
        requests = self._requests[rows]
        drawing = np.flatnonzero(requests["inverse_temperature"])
        scored = np.flatnonzero(requests["num_logprobs"] >= 0)
        return _Plan(
            rows=rows,
            draws=self._make_draws(drawing, requests[drawing]) if len(drawing) > 0 else None,
            scored=scored,
            num_top=requests["num_logprobs"][scored].tolist(),
        )

    def _make_draws(self, indices: Int64Array, requests: NDArray[np.void]) -> _Draws:
        is_ranked = (requests["top_k"] < self._vocab_size) | (requests["top_p"] < 1.0)
        min_p = np.where(is_ranked, np.float32(0.0), requests["min_p"])
        scales = requests["inverse_temperature"]
        return _Draws(
            indices=indices,
            seeds=np.ascontiguousarray(requests["seed"]),
            inverse_temperature=self._column(scales) if (scales != 1.0).any() else None,
            limits=Limits(
                min_p=self._column(min_p) if min_p.any() else None,
                ranked=self._rank_limits(is_ranked, requests) if is_ranked.any() else None,
            ),
        )

    def _rank_limits(self, chosen: NDArray[np.bool_], requests: NDArray[np.void]) -> RankLimits:
        ranked = requests[chosen]
        return RankLimits(
            rows=None if chosen.all() else self._tensor(np.flatnonzero(chosen)),
            top_k=self._column(ranked["top_k"]),
            top_p=self._column(ranked["top_p"]),
            min_p=self._column(ranked["min_p"]),
        )

    def _choose(
        self, logits: Tensor, draws: _Draws | None, num_outputs: Int64Array
    ) -> tuple[Tensor, Tensor]:
        """Token and validity of each row [S]; a row with NaN or infinities gets any token."""
        token_ids, maxima = argmax(logits)
        valid = maxima.isfinite()
        if draws is None:
            return token_ids, valid
        numbers = self._column(uniforms(draws.seeds, num_outputs[draws.indices]))
        if len(draws.indices) == len(logits):
            weights = weigh_(logits, maxima, draws.inverse_temperature)
            return draw(weights, numbers, draws.limits), valid
        rows = self._tensor(draws.indices)
        weights = weigh_(logits[rows], maxima[rows], draws.inverse_temperature)
        token_ids[rows] = draw(weights, numbers, draws.limits)
        return token_ids, valid

    def _score(self, logits: Tensor, token_ids: Tensor, plan: _Plan) -> list[TokenLogprobs | None]:
        entries = token_logprobs(logits, token_ids[self._tensor(plan.scored)], max(plan.num_top))
        result: list[TokenLogprobs | None] = [None] * len(plan.rows)
        for index, num_top, entry in zip(plan.scored.tolist(), plan.num_top, entries, strict=True):
            result[index] = replace(
                entry,
                top_token_ids=entry.top_token_ids[:num_top],
                top_logprobs=entry.top_logprobs[:num_top],
            )
        return result

    def _column(self, values: NDArray[np.generic]) -> Tensor:
        return self._tensor(np.ascontiguousarray(values)[:, None])

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device)
