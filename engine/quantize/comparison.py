"""Comparison: what two models' next-token logits say about the loss between them.

Sums over tokens as they come, in chunks of any size; it knows neither models nor texts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A model on held-out text; without a reference there is its perplexity alone."""

    num_tokens: int  # that were predicted
    perplexity: float
    reference_perplexity: float | None = None
    kl_mean: float | None = None  # nats per token, of the reference's distribution to the model's
    kl_p99: float | None = None  # nats, the 99th percentile over tokens
    top1_agreement: float | None = None  # share of tokens before which both have the same favourite
    # ‖h' − h‖ / ‖h‖ of the hidden states after each layer, mean over tokens
    hidden_errors: tuple[float, ...] = ()


# Log probabilities are float64, because int8 keys and values cost 2.5e-6 nats and float32 rounds by
# as much. So many are held at once, a few times over: 16 MB each.
MAX_WIDE = 2**21


class Comparison:
    """Collects tokens with the logits before them; `name` stands in errors."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loss = 0.0
        self._reference_loss = 0.0
        self._num_agreed = 0
        self._num_tokens = 0
        self._divergences: list[Tensor] = []  # float64 [tokens]

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Logits [tokens, V] of the model and its reference before the targets, int64 [tokens]."""
        step = max(1, MAX_WIDE // logits.shape[1])
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            self._add(logits[part], targets[part], None if reference is None else reference[part])

    def _add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        found = self._log_probabilities(logits)
        self._num_tokens += len(targets)
        self._loss += _loss(found, targets)
        if reference is None:
            return
        true = self._log_probabilities(reference)
        self._reference_loss += _loss(true, targets)
        self._num_agreed += int((true.argmax(1) == found.argmax(1)).sum())
        self._divergences.append((true.exp() * (true - found)).sum(1).cpu())

    def evaluation(self, hidden_errors: tuple[float, ...] = ()) -> Evaluation:
        assert self._num_tokens, "no tokens"
        perplexity = math.exp(self._loss / self._num_tokens)
        if not self._divergences:
            return Evaluation(num_tokens=self._num_tokens, perplexity=perplexity)
        divergences = torch.cat(self._divergences)
        return Evaluation(
            num_tokens=self._num_tokens,
            perplexity=perplexity,
            reference_perplexity=math.exp(self._reference_loss / self._num_tokens),
            # A mean of nothing but rounding may come out below zero.
            kl_mean=max(0.0, float(divergences.mean())),
            kl_p99=max(0.0, float(divergences.quantile(0.99))),
            top1_agreement=self._num_agreed / self._num_tokens,
            hidden_errors=hidden_errors,
        )

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        found = logits.double().log_softmax(-1)
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                f"{self._name}: its logits are not finite on the held-out text, or infinitely far "
                "apart; its weights are damaged, or need a wider dtype than they were given"
            )
        return found


def _loss(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(1, targets[:, None]).sum())
