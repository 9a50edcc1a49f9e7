"""Repetition, presence and frequency penalties, applied to the logits of tokens seen before.

Repetition (HF's rule: a positive logit is divided, a negative one multiplied) looks at prompt and
output; presence and frequency (OpenAI's) are subtracted afterwards and look at the output only.
All three address tokens through the history: a token seen twice is simply met twice, and no table
of counts over the vocabulary exists.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import NewRow
from engine.token_history import TokenHistory

Int64Array = NDArray[np.int64]

_STRENGTHS = np.dtype(
    [("repetition", np.float32), ("presence", np.float32), ("frequency", np.float32)]
)


@dataclass(frozen=True, slots=True)
class _Group:
    """P rows of the batch that share a kind of penalty."""

    indices: Int64Array  # [P] in the batch
    rows: Tensor  # [P] in the history
    first_logit: Tensor  # [P, 1] where the row begins in the flat logits
    strengths: tuple[Tensor, ...]  # [P, 1] each


class Penalties:
    def __init__(self, vocab_size: int, max_num_seqs: int, history: TokenHistory) -> None:
        self._vocab_size = vocab_size
        self._history = history
        self._strengths = np.zeros(max_num_seqs, dtype=_STRENGTHS)
        self._repetition: _Group | None = None
        self._counting: _Group | None = None

    def admit(self, new: NewRow) -> bool:
        """Note the row's penalties; True when it has any, and so needs its history written."""
        params = new.params
        strengths = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._strengths[new.row] = strengths
        return strengths != (1.0, 0.0, 0.0)

    def select(self, rows: Int64Array) -> None:
        """Prepare for a batch of these rows [S]."""
        strengths = self._strengths[rows]
        counting = (strengths["presence"] != 0) | (strengths["frequency"] != 0)
        self._repetition = self._group(rows, strengths["repetition"] != 1, "repetition")
        self._counting = self._group(rows, counting, "presence", "frequency")

    def apply(self, logits: Tensor, num_prompt: Int64Array, num_outputs: Int64Array) -> None:
        """Edit contiguous logits [S, V] in place; counts [S] of tokens so far."""
        if self._repetition is not None:
            self._repeat(logits.view(-1), self._repetition, num_prompt + num_outputs)
        if self._counting is not None:
            self._count(logits.view(-1), self._counting, num_prompt, num_outputs)

    def _repeat(self, flat: Tensor, group: _Group, num_tokens: Int64Array) -> None:
        starts = np.zeros(len(group.indices), dtype=np.int64)
        where, _ = self._seen(group, starts, num_tokens[group.indices])
        values = flat[where]
        (strength,) = group.strengths
        flat[where] = torch.where(values > 0, values / strength, values * strength)

    def _count(
        self, flat: Tensor, group: _Group, num_prompt: Int64Array, num_outputs: Int64Array
    ) -> None:
        lengths = num_outputs[group.indices]
        if not lengths.any():
            return
        where, seen = self._seen(group, num_prompt[group.indices], lengths)
        presence, frequency = group.strengths
        flat[where] = flat[where] - presence * seen[:, :1]
        flat.index_add_(0, where.view(-1), (frequency * seen).neg_().view(-1))

    def _seen(
        self, group: _Group, starts: Int64Array, lengths: Int64Array
    ) -> tuple[Tensor, Tensor]:
        """Flat logit index and 0/1 [P, L] of each token in the windows of the history.

        Beyond its length a row repeats its first token, so that writing one value per token
        (the same for the same token) stays right; an empty row has 0 there as well.
        """
        device = group.rows.device
        width = int(min(lengths.max(), self._history.session_len))
        lengths_on_device = torch.from_numpy(lengths).to(device)[:, None]
        token_ids = self._history.window(group.rows, torch.from_numpy(starts).to(device), width)
        inside = torch.arange(width, device=device) < lengths_on_device
        token_ids = torch.where(inside, token_ids, token_ids[:, :1])
        return group.first_logit + token_ids, inside.to(torch.float32)

    def _group(self, rows: Int64Array, chosen: NDArray[np.bool_], *names: str) -> _Group | None:
        if not chosen.any():
            return None
        indices = np.flatnonzero(chosen)
        device = self._history.device
        strengths = self._strengths[rows[indices]]
        return _Group(
            indices=indices,
            rows=torch.from_numpy(rows[indices]).to(device),
            first_logit=torch.from_numpy(indices[:, None] * self._vocab_size).to(device),
            strengths=tuple(
                torch.from_numpy(np.ascontiguousarray(strengths[name])[:, None]).to(device)
                for name in names
            ),
        )
