"""What calibration samples say about the inputs of linears, as sums that workers can add up.

Statistics are of one stage's inputs. A Calibration holds the samples' hidden states and takes
them through the model with each layer as it is, quantised or not; it knows no method.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.quantize.files import LazyTensor, write_tensors
from engine.quantize.layer import DenseLayer

AFTER_ATTENTION = ("gate_up", "down")

COLUMNS = 512  # of a Gram matrix that are computed at once


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the inputs x [K] of all tokens, float32."""

    gram: Tensor  # [K, K], the sum of x xᵀ
    abs_sum: Tensor  # [K], the sum of |x|
    abs_max: Tensor  # [K]
    num_tokens: int

    @classmethod
    def of(cls, x: Tensor) -> "Statistics":
        """Of inputs [tokens, K]."""
        wide = x.float()
        size = wide.abs()
        return cls(_gram(wide), size.sum(0), size.amax(0), wide.shape[0])

    @property
    def abs_mean(self) -> Tensor:
        return self.abs_sum / self.num_tokens

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.gram + other.gram,
            self.abs_sum + other.abs_sum,
            torch.maximum(self.abs_max, other.abs_max),
            self.num_tokens + other.num_tokens,
        )

    def scaled(self, scale: Tensor) -> "Statistics":
        """Of the inputs scale * x, for a positive scale [K]."""
        return Statistics(
            self.gram * scale.unsqueeze(0) * scale.unsqueeze(1),
            self.abs_sum * scale,
            self.abs_max * scale,
            self.num_tokens,
        )


class Calibration(Protocol):
    """Samples on their way through the model.

    For each layer: the statistics of its stages in their order, each any number of times, with
    the layer changed in between; then `advance`. Weights and biases of q, k, v and o must be final
    before gate_up's statistics.
    """

    def statistics(self, layer: DenseLayer, stage: str) -> Statistics: ...

    def advance(self, layer: DenseLayer) -> None:
        """Take all samples through the layer as it now is."""
        ...


class LocalCalibration:
    """All samples in this process; `batch_size` of them are computed at once.

    The hidden states [samples, T, H] stay where they are (a CPU's memory, for a layer on a GPU
    too) and are replaced in place, by the residual stream after attention on the way.
    """

    def __init__(self, hidden: Tensor, batch_size: int = 1) -> None:
        self._hidden = hidden
        self._batch_size = batch_size
        self._attended: int | None = None  # the layer whose attention the states have passed

    @property
    def hidden(self) -> Tensor:
        """[samples, T, H], the inputs of the next layer."""
        assert self._attended is None, "the samples are within a layer"
        return self._hidden

    def statistics(self, layer: DenseLayer, stage: str) -> Statistics:
        """CheckpointError when the layer's values have left the range of its dtype."""
        if stage in AFTER_ATTENTION:
            self._pass_attention(layer)
        total: Statistics | None = None
        for part in self._batches():
            x = layer.stage_input(stage, part.to(layer.device, layer.dtype))
            found = Statistics.of(x.flatten(0, 1))
            total = found if total is None else total + found
        assert total is not None, "no samples"
        if not bool(torch.isfinite(total.gram.diagonal()).all()):
            raise CheckpointError(
                f"layer {layer.index}: the inputs of {stage} are not finite on the calibration "
                "text; its weights are damaged, or need a wider dtype than they were given"
            )
        return total

    def advance(self, layer: DenseLayer) -> None:
        """Take all samples through the layer as it now is."""
        self._pass_attention(layer)
        for part in self._batches():
            part.copy_(layer.add_mlp(part.to(layer.device, layer.dtype)))
        self._attended = None

    def save(self, path: Path) -> None:
        """Write the hidden states between two layers, for `load`."""
        write_tensors(path, {"hidden": LazyTensor.of(self.hidden)}, {})

    @classmethod
    def load(cls, path: Path, batch_size: int = 1) -> "LocalCalibration":
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("hidden").clone(), batch_size)

    def _pass_attention(self, layer: DenseLayer) -> None:
        if self._attended == layer.index:
            return
        assert self._attended is None, f"layer {self._attended} was not advanced"
        for part in self._batches():
            part.copy_(layer.add_attention(part.to(layer.device, layer.dtype)))
        self._attended = layer.index

    def _batches(self) -> Iterator[Tensor]:
        """Views of the hidden states."""
        return iter(torch.split(self._hidden, self._batch_size))


def _gram(x: Tensor) -> Tensor:
    """xᵀ x of x [tokens, K]; the part below the diagonal is a copy of that above."""
    size = x.shape[1]
    gram = x.new_empty(size, size)
    for start in range(0, size, COLUMNS):
        stop = min(start + COLUMNS, size)
        torch.mm(x[:, :stop].t(), x[:, start:stop], out=gram[:stop, start:stop])
        gram[start:stop, :start] = gram[:start, start:stop].t()
    return gram
