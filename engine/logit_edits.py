"""LogitEdits: what requests do to the logits before a token is chosen.

In this order: penalties; logit_bias; allowed_token_ids; bad_words; min_tokens. The bans come
last, so no bias or allowance undoes them; where they leave nothing, every logit is -inf. bad_words
are matched against prompt and output together: a word may begin in the prompt.

An edit touches only the logits it names, and a kind no row of the batch uses costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import NewRow
from engine.penalties import Penalties
from engine.row_entries import RowEntries
from engine.token_history import TokenHistory

Int64Array = NDArray[np.int64]

_ANY_TOKEN = -1  # pads the beginnings of shorter bad words on the left


@dataclass(frozen=True, slots=True)
class _BadWords:
    """W words of two tokens or more in the batch."""

    indices: Int64Array  # [W] of their rows in the batch
    rows: Tensor  # [W] in the history
    beginnings: Tensor  # [W, longest] all but the last token, right-aligned
    last: Tensor  # [W] flat logit index of the last token


@dataclass(frozen=True, slots=True)
class _Edits:
    """One batch's edits, rebuilt when its rows change. Tensors are flat logit indices."""

    num_prompt: Int64Array  # [S]
    min_tokens: Int64Array  # [S]
    looking_back: tuple[Int64Array, Tensor]  # batch index and history row of each
    bias: tuple[Tensor, Tensor] | None  # index and value
    allowed: tuple[Tensor, Tensor] | None  # index and the batch rows that have such a list
    banned: Tensor | None
    bad_words: _BadWords | None
    banned_early: tuple[Int64Array, Int64Array] | None  # batch row and logit index, on the host


class _Flat(NamedTuple):
    """n entries of a batch."""

    indices: Int64Array  # [n] rows of the batch
    logits: Int64Array  # [n] index in the flat logits
    values: NDArray[Any]  # [n, width]


class LogitEdits:
    def __init__(self, vocab_size: int, max_num_seqs: int, session_len: int, device: str) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._history = TokenHistory(max_num_seqs, session_len, device)
        self._penalties = Penalties(vocab_size, max_num_seqs, self._history)
        self._num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self._min_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._looks_back = np.zeros(max_num_seqs, dtype=np.bool_)
        self._bias = RowEntries()
        self._allowed = RowEntries()
        self._banned = RowEntries()
        self._banned_early = RowEntries()
        self._bad_words = RowEntries(pad=_ANY_TOKEN)
        self._batch: _Edits | None = None

    def admit(self, new: NewRow) -> None:
        """Take over a row for a sequence that entered the running set."""
        row, params = new.row, new.params
        long_words = [word for word in params.bad_words if len(word) > 1]
        self._num_prompt[row] = len(new.prompt_token_ids)
        self._min_tokens[row] = params.min_tokens
        self._looks_back[row] = self._penalties.admit(new) or bool(long_words)
        if self._looks_back[row]:
            self._history.write(row, new.prompt_token_ids + new.output_token_ids)
        bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._bias.replace(row, list(params.logit_bias), bias[:, None])
        for entries, token_ids in (
            (self._allowed, params.allowed_token_ids or ()),
            (self._banned, [word[0] for word in params.bad_words if len(word) == 1]),
            (self._banned_early, _early_bans(new)),
        ):
            entries.replace(row, list(token_ids), _no_values(len(token_ids)))
        self._bad_words.replace(row, [word[-1] for word in long_words], _beginnings(long_words))

    def select(self, rows: Int64Array) -> None:
        """Prepare for a batch of these rows [S]: logits row i belongs to rows[i]."""
        index_of_row = np.full(len(self._num_prompt), -1, dtype=np.int64)
        index_of_row[rows] = np.arange(len(rows))
        self._penalties.select(rows)
        looking_back = np.flatnonzero(self._looks_back[rows])
        bias = self._flat(self._bias, index_of_row)
        allowed = self._flat(self._allowed, index_of_row)
        banned = self._flat(self._banned, index_of_row)
        early = self._flat(self._banned_early, index_of_row)
        self._batch = _Edits(
            num_prompt=self._num_prompt[rows],
            min_tokens=self._min_tokens[rows],
            looking_back=(looking_back, self._tensor(rows[looking_back])),
            bias=bias and (self._tensor(bias.logits), self._tensor(bias.values[:, 0])),
            allowed=allowed
            and (self._tensor(allowed.logits), self._tensor(np.unique(allowed.indices))),
            banned=banned and self._tensor(banned.logits),
            bad_words=self._select_bad_words(rows, index_of_row),
            banned_early=early and (early.indices, early.logits),
        )

    def apply(self, logits: Tensor, num_outputs: Int64Array) -> None:
        """Edit contiguous logits [S, V] of the selected rows in place; num_outputs [S] so far."""
        batch = self._batch
        assert batch is not None, "select comes first"
        self._penalties.apply(logits, batch.num_prompt, num_outputs)
        flat = logits.view(-1)
        if batch.bias is not None:
            flat.index_add_(0, *batch.bias)
        if batch.allowed is not None:
            token_indices, row_indices = batch.allowed
            allowed = flat[token_indices]
            logits.index_fill_(0, row_indices, -torch.inf)
            flat[token_indices] = allowed
        if batch.banned is not None:
            flat.index_fill_(0, batch.banned, -torch.inf)
        if batch.bad_words is not None:
            self._ban_completions(flat, batch.bad_words, batch.num_prompt + num_outputs)
        if batch.banned_early is not None:
            row_indices_early, token_indices_early = batch.banned_early
            waiting = (num_outputs < batch.min_tokens)[row_indices_early]
            if waiting.any():
                flat.index_fill_(0, self._tensor(token_indices_early[waiting]), -torch.inf)

    def append(self, token_ids: Tensor, num_outputs: Int64Array) -> None:
        """Note the tokens [S] chosen after num_outputs [S] others."""
        batch = self._batch
        assert batch is not None, "select comes first"
        indices, rows = batch.looking_back
        if len(indices) > 0:
            lengths = (batch.num_prompt + num_outputs)[indices]
            self._history.append(rows, self._tensor(lengths), token_ids[self._tensor(indices)])

    def _ban_completions(self, flat: Tensor, words: _BadWords, num_tokens: Int64Array) -> None:
        longest = words.beginnings.shape[1]
        starts = self._tensor(num_tokens[words.indices] - longest)
        recent = self._history.window(words.rows, starts, longest)
        exists = starts[:, None] + torch.arange(longest, device=flat.device) >= 0
        same = (recent == words.beginnings) & exists
        matched = (same | (words.beginnings == _ANY_TOKEN)).all(dim=1)
        # Words may share a last token: the minimum is -inf when any of them matches.
        limits = torch.where(matched, -torch.inf, torch.inf)
        flat.scatter_reduce_(0, words.last, limits, "amin")

    def _select_bad_words(self, rows: Int64Array, index_of_row: Int64Array) -> _BadWords | None:
        words = self._flat(self._bad_words, index_of_row)
        return words and _BadWords(
            indices=words.indices,
            rows=self._tensor(rows[words.indices]),
            beginnings=self._tensor(words.values),
            last=self._tensor(words.logits),
        )

    def _flat(self, entries: RowEntries, index_of_row: Int64Array) -> _Flat | None:
        selected = entries.select(index_of_row)
        if selected is None:
            return None
        indices, token_ids, values = selected
        return _Flat(indices, indices * self._vocab_size + token_ids, values)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _no_values(length: int) -> Int64Array:
    return np.zeros((length, 0), dtype=np.int64)


def _early_bans(new: NewRow) -> list[int]:
    """Tokens that would end the sequence, if it may not end yet."""
    if len(new.output_token_ids) >= new.params.min_tokens:
        return []
    return [*new.eos_token_ids, *new.params.stop_token_ids]


def _beginnings(words: Sequence[Sequence[int]]) -> Int64Array:
    """All but the last token of each word, right-aligned: [words, longest - 1]."""
    longest = max((len(word) for word in words), default=2) - 1
    padded = np.full((len(words), longest), _ANY_TOKEN, dtype=np.int64)
    for line, word in zip(padded, words, strict=True):
        line[longest - len(word) + 1 :] = word[:-1]
    return padded
