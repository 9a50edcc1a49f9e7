"""Pruning n of every m: Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774).

Of every m inputs of an output, neighbours from a multiple of m on, n are kept. The weights stay
dense and in the checkpoint's dtype. Each row is pruned by itself.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.quantize.feedback import BLOCK, feed_back, inverse_factor
from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.method import LayerPass, LayerResult, stored_dtype
from engine.quantize.statistics import Calibration

PATTERN_HELP = "a pattern n:m keeps n of every m inputs, 0 < n < m, such as 2:4"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Of every `of` inputs `keep` are kept."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        parts = text.split(":")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise ConfigError(f"pattern {text!r} is not n:m; {PATTERN_HELP}")
        return cls(int(parts[0]), int(parts[1]))

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise ConfigError(f"pattern {self.keep}:{self.of} cannot be; {PATTERN_HELP}")

    def keepers(self, scores: Tensor) -> Tensor:
        """scores [..., of] -> True where one of the `keep` largest is, the first of equal ones."""
        order = scores.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        return kept.scatter_(-1, order[..., : self.keep], value=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """`damping` is SparseGPT's, as in GPTQ."""

    pattern: Pattern = Pattern(2, 4)
    method: Literal["wanda", "sparsegpt"] = "sparsegpt"
    damping: float = 0.01
    skip: tuple[str, ...] = ()

    def quantize_layer(self, layer: DenseLayer, calibration: Calibration) -> LayerResult:
        progress, dtype = LayerPass(layer, self.skip), stored_dtype(layer.spec)
        for stage in STAGES:
            statistics, weights = calibration.statistics(layer, stage), progress.weights(stage)
            if not weights:
                continue
            self._check(layer, next(iter(weights)), statistics.gram.shape[0])
            pruned = self.prune(torch.cat(list(weights.values())), statistics.gram).to(dtype)
            parts = torch.split(pruned, [weight.shape[0] for weight in weights.values()])
            progress.replace(weights, dict(zip(weights, parts, strict=True)), statistics)
        calibration.advance(layer)
        return progress.result()

    def prune(self, rows: Tensor, gram: Tensor) -> Tensor:
        """Rows [N, K] whose inputs have the Gram matrix [K, K] -> float32 [N, K]."""
        if self.method == "wanda":
            return prune_wanda(rows, gram, self.pattern)
        return prune_sparsegpt(rows, gram, self.pattern, self.damping)

    def _check(self, layer: DenseLayer, role: str, in_features: int) -> None:
        if in_features % self.pattern.of:
            raise ConfigError(
                f"{layer.module(role)} has {in_features} inputs, which pattern "
                f"{self.pattern.keep}:{self.pattern.of} does not divide"
            )


def prune_wanda(rows: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest |w| * |x|, where |x| is the root of the input's sum of squares."""
    scores = rows.abs() * gram.diagonal().clamp(min=0).sqrt()
    kept = pattern.keepers(scores.view(rows.shape[0], -1, pattern.of)).flatten(1)
    return torch.where(kept, rows, torch.zeros_like(rows))


def prune_sparsegpt(rows: Tensor, gram: Tensor, pattern: Pattern, damping: float) -> Tensor:
    """Keep what would cost most to lose once the inputs to come have made up for it."""
    columns = rows.float().t().clone()
    upper = inverse_factor(gram, damping)
    diagonal = upper.diagonal()
    kept = torch.empty_like(columns, dtype=torch.bool)

    def changed(k: int) -> Tensor:
        if k % pattern.of == 0:
            own = slice(k, k + pattern.of)
            kept[own] = pattern.keepers((columns[own].t() / diagonal[own]).square()).t()
        return torch.where(kept[k], columns[k], torch.zeros_like(columns[k]))

    feed_back(columns, upper, changed, block=pattern.of * max(1, BLOCK // pattern.of))
    return columns.t().contiguous()
