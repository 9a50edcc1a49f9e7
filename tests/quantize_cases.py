"""Weights, correlated inputs and tiny layers for the tests of quantisers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.models import load_spec
from engine.quantize.layer import DenseLayer
from engine.quantize.model import DenseModel
from engine.quantize.statistics import LocalCalibration, Statistics
from engine.weights.checkpoint import Checkpoint
from engine.weights.matrix import Int4Matrix
from tests.tiny_models import tiny_model

IDS = torch.randint(3, 131, (4, 40), generator=torch.Generator().manual_seed(5))


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int, tokens: int = 600, seed: int = 1) -> Tensor:
    """Correlated, of very different sizes: what activation-aware methods are made for."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    spread: Tensor = (torch.eye(columns) + mix) * sizes
    return torch.randn(tokens, columns, generator=generator) @ spread


def statistics(columns: int) -> Statistics:
    return Statistics.of(inputs(columns))


def loss(rounded: Tensor, exact: Tensor, x: Tensor) -> float:
    """The squared error of the outputs on samples x [tokens, K], in float64."""
    return float((x.double() @ (rounded.double() - exact.double()).t()).square().sum())


def values(matrix: Int4Matrix) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The definition in engine/weights/matrix.py, element by element: [N, K]."""
    q, zeros, scales = (part.double().numpy() for part in (matrix.q, matrix.zeros, matrix.scales))
    in_features, out_features = q.shape
    order = range(in_features) if matrix.input_order is None else matrix.input_order.tolist()
    found = np.zeros((out_features, in_features))
    for k, source in enumerate(order):
        group = k // matrix.group_size
        found[:, source] = (q[k] - zeros[group]) * scales[group]
    return found


@dataclass
class Case:
    """A layer of a tiny model, and its samples before that layer."""

    layer: DenseLayer
    calibration: LocalCalibration
    hidden: Tensor  # a copy of the samples


def tiny_layer(family: str, index: int = 0, **config: Any) -> Case:
    path = tiny_model(family, **config).path
    with DenseModel(Checkpoint(path), load_spec(path)) as model:
        hidden = model.embed(IDS)
        for earlier in range(index):
            hidden = model.layer(earlier).forward(hidden)
        return Case(model.layer(index), LocalCalibration(hidden.clone(), 2), hidden)
