"""Quantisation jobs of tiny models: what their tests share."""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.quantize import recipes
from engine.quantize.job import QuantizationJob
from engine.quantize.layer import DenseLayer
from engine.quantize.method import LayerResult, Method
from engine.quantize.recipes import Recipe
from engine.quantize.source import Source
from engine.quantize.statistics import Calibration
from tests.dequantized import put_into_reference
from tests.paged_decoding import PagedDecoder
from tests.tiny_models import TinyModel

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "vocab_size": 131,
}
GROUP = 32
AWQ = recipes.awq(GROUP, symmetric=False, search_scale=False)
RTN = recipes.rtn(GROUP, symmetric=False)
PROMPT = [5, 6, 7, 8, 9]
NUM_TOKENS = 12

# Forked by a process that has imported what is needed and computed nothing: this one has threads,
# whose locks a child of its own would wait for.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def samples() -> Tensor:
    return torch.randint(3, 131, (3, 16), generator=torch.Generator().manual_seed(1))


def make_job(source: Path, work_dir: Path, recipe: Recipe = AWQ, **options: Any) -> QuantizationJob:
    settings: dict[str, Any] = {
        "source": Source.open(source),
        "work_dir": work_dir,
        "method": recipe.method,
        "output": recipe.output,
        "settings": recipe.settings,
        "samples": samples() if recipe.calibrates else None,
    }
    return QuantizationJob(**(settings | options))


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def greedy(path: Path) -> list[int]:
    """The engine's tokens."""
    return PagedDecoder(path).greedy(PROMPT, NUM_TOKENS)


def reference_greedy(model: TinyModel, path: Path) -> list[int]:
    """transformers' tokens, with weights read independently."""
    reference = put_into_reference(model, path)
    with torch.no_grad():
        found = reference.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


@dataclass(frozen=True)
class EndsIn:
    """A method that ends in a layer, once some of it is done."""

    method: Method
    layer: int
    end: Callable[[], None]

    def quantize_layer(self, layer: DenseLayer, calibration: Calibration) -> LayerResult:
        if layer.index == self.layer:
            if calibration is not None:
                calibration.statistics(layer, "gate_up")
            self.end()
        return self.method.quantize_layer(layer, calibration)
