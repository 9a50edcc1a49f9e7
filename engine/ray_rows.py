"""Rows over Ray actors: the outputs of a linear, searched and rounded by several workers at once.

Every method quantises each row by itself, given what all rows share (the inputs' Gram matrix), so
that the rows are dealt out and what comes back is put end to end. Sums over rows differ by
rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from engine.quantize.awq import Awq, scale_losses
from engine.quantize.gptq import Gptq
from engine.quantize.method import Method
from engine.quantize.output import merge
from engine.quantize.prune import Prune
from engine.quantize.statistics import Statistics
from engine.weights.matrix import Int4Matrix

T = TypeVar("T")


class Workers(Protocol):
    """Where the actors come from: they start with the samples, after the method is made."""

    def compute(self, function: Callable[..., T], parts: Sequence[Tensor], *shared: Any) -> list[T]:
        """function(part, *shared) for each part, each on an actor of its own, on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Deals rows [N, K] over `num_workers` of the workers."""

    workers: Workers
    num_workers: int

    def map(self, function: Callable[..., T], rows: Tensor, *shared: Any) -> list[T]:
        """function(some rows, *shared) of all rows in their order."""
        parts = torch.tensor_split(rows.cpu(), min(self.num_workers, len(rows)))
        return self.workers.compute(function, parts, *shared)


@dataclass(frozen=True, kw_only=True)
class SharedAwq(Awq):
    """Awq whose losses and levels are computed by workers."""

    rows: Rows

    def losses(self, weight: Tensor, gram: Tensor, scales: list[Tensor]) -> Tensor:
        found = self.rows.map(scale_losses, weight, gram, scales, self.group_size, self.symmetric)
        return torch.stack(found).sum(0).to(weight.device)

    def quantize(self, weight: Tensor, statistics: Statistics) -> Int4Matrix:
        function = Awq(**_values(self, Awq)).quantize
        return _merge_rows(self.rows.map(function, weight, statistics), weight.device)


@dataclass(frozen=True, kw_only=True)
class SharedGptq(Gptq):
    """Gptq whose rows are rounded by workers; each factorises the Gram matrix for itself."""

    rows: Rows

    def quantize(self, rows: Tensor, gram: Tensor) -> Int4Matrix:
        return _merge_rows(
            self.rows.map(Gptq(**_values(self, Gptq)).quantize, rows, gram), rows.device
        )


@dataclass(frozen=True, kw_only=True)
class SharedPrune(Prune):
    """Prune whose rows are pruned by workers."""

    rows: Rows

    def prune(self, rows: Tensor, gram: Tensor) -> Tensor:
        found = self.rows.map(Prune(**_values(self, Prune)).prune, rows, gram)
        return torch.cat(found).to(rows.device)


def shared_method(method: Method, workers: Workers, num_workers: int) -> Method:
    """The method with its rows dealt out; as it is when one worker would get all of them."""
    if num_workers == 1:
        return method
    rows = Rows(workers, num_workers)
    for kind, shared in ((Awq, SharedAwq), (Gptq, SharedGptq), (Prune, SharedPrune)):
        if isinstance(method, kind):
            return shared(**_values(method, kind), rows=rows)
    raise AssertionError(f"{method} has no rows to share")


def _values(method: Any, kind: type) -> dict[str, Any]:
    """Those fields of a method that its kind has."""
    return {field.name: getattr(method, field.name) for field in fields(kind)}


def _merge_rows(parts: list[Int4Matrix], device: torch.device) -> Int4Matrix:
    merged = merge(list(parts), None)
    assert isinstance(merged, Int4Matrix)
    order = merged.input_order
    return Int4Matrix(
        merged.q.to(device),
        merged.zeros.to(device),
        merged.scales.to(device),
        order if order is None else order.to(device),
    )
