"""What a checkpoint says on held-out text, alone or beside a reference, layer by layer from disk.

Of the models one layer is in memory at a time, and at the end their heads; the hidden states of
all samples stay, one set per model. Any format that the engine reads will do.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.models import load_spec
from engine.quantize.calibration import HeldOut
from engine.quantize.comparison import Comparison, Evaluation
from engine.quantize.layer import DenseLayer
from engine.quantize.model import DenseModel, Head
from engine.tokenizer import Tokenizer
from engine.weights.checkpoint import Checkpoint

Progress = Callable[[int, int], None]  # steps that are done, and of how many

# Of one model that are held at once: 64 MB. A head's table is converted for so many together.
MAX_LOGITS = 2**24


def evaluate(
    path: Path,
    reference: Path | None,
    samples: HeldOut,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """The checkpoint on held-out tokens; what a reference's absence leaves open is None.

    CheckpointError when the two are not of one shape and one vocabulary.
    """
    paths = [path] if reference is None else [reference, path]
    if reference is not None:
        _check_same_tokens(path, reference)
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(each, dtype, device)) for each in paths]
        _check_same_shape(models)
        lanes = [Lane(model) for model in models]
        (found,) = compare(lanes, samples, batch_size, progress)
    return found


def open_model(path: Path, dtype: torch.dtype, device: str) -> DenseModel:
    spec = load_spec(path)  # first: it says what is wrong with a path
    return DenseModel(Checkpoint(path), spec, dtype, device)


def weight_bytes(path: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    with Checkpoint(path) as checkpoint:
        files = {stored.file for stored in checkpoint.tensors.values()}
    return sum((path / file).stat().st_size for file in files)


@dataclass(frozen=True, slots=True)
class Lane:
    """A way through a model: as it is, or with its keys and values quantised."""

    model: DenseModel
    kv_policy: int = 0

    def layer(self, index: int, last: DenseLayer | None) -> DenseLayer:
        """Layer `index`; of `last`, the neighbour's, the weights if they are the same."""
        found = self.model.layer(index) if last is None else last
        return replace(found, kv_policy=self.kv_policy)


@torch.inference_mode()
def compare(
    lanes: list[Lane], samples: HeldOut, batch_size: int = 1, progress: Progress | None = None
) -> list[Evaluation]:
    """Of every lane but the first, which is the reference; of a single lane, its own."""
    spec = lanes[0].model.spec
    num_layers, done = spec.num_layers, 0
    hidden = [lane.model.embed(samples.token_ids).cpu() for lane in lanes]
    errors: list[list[float]] = [[] for _ in lanes]
    layer: DenseLayer | None = None
    for index in range(num_layers):
        for i, lane in enumerate(lanes):
            shared = i > 0 and lanes[i - 1].model is lane.model
            kept = layer if shared else None
            layer = None  # two layers are never held at once
            layer = lane.layer(index, kept)
            _advance(layer, hidden[i], batch_size)
            errors[i].append(_hidden_error(hidden[i], hidden[0]) if i else 0.0)
            done += 1
            if progress is not None:
                progress(done, (num_layers + 1) * len(lanes))
    layer = None
    comparisons = _score(lanes, hidden, samples)
    if progress is not None:
        progress((num_layers + 1) * len(lanes), (num_layers + 1) * len(lanes))
    return [
        comparison.evaluation(tuple(each))
        for comparison, each in zip(comparisons, errors[-len(comparisons) :], strict=True)
    ]


def _advance(layer: DenseLayer, hidden: Tensor, batch_size: int) -> None:
    """Replace hidden [E, T, H] by the layer's outputs."""
    for part in torch.split(hidden, batch_size):
        part.copy_(layer.forward(part.to(layer.device, layer.dtype)))


def _hidden_error(found: Tensor, true: Tensor) -> float:
    """Mean over tokens: a few have states a thousand times as long as the others', and would
    be all that a norm over all tokens shows.
    """
    total, num_tokens = 0.0, found.shape[0] * found.shape[1]
    for ours, theirs in zip(found, true, strict=True):
        size = theirs.float().norm(dim=-1).clamp_(min=torch.finfo(torch.float32).tiny)
        total += float(((ours - theirs).float().norm(dim=-1) / size).sum())
    return total / num_tokens


def _score(lanes: list[Lane], hidden: list[Tensor], samples: HeldOut) -> list[Comparison]:
    """All lanes but the first against it, or the only one by itself."""
    heads: dict[int, Head] = {}
    for model in {id(lane.model): lane.model for lane in lanes}.values():
        # Quantisers leave the head as it is, so that two models mostly have one table.
        heads[id(model)] = model.head(beside=next(iter(heads.values()), None))
    compared = list(zip(lanes, hidden, strict=True))[-max(1, len(lanes) - 1) :]
    comparisons = [Comparison(str(lane.model.checkpoint.path)) for lane, _ in compared]
    step = max(1, MAX_LOGITS // lanes[0].model.spec.vocab_size)

    def logits(lane: Lane, states: Tensor) -> Tensor:
        model = lane.model
        return heads[id(model)].logits(states.to(model.device, model.dtype))

    for row, (ids, counted) in enumerate(zip(samples.token_ids, samples.counted, strict=True)):
        places = counted[1:].nonzero().squeeze(1)  # before the tokens that count
        for part in torch.split(places, step):
            targets = ids[part + 1].to(lanes[0].model.device)
            true = logits(lanes[0], hidden[0][row, part]) if len(lanes) > 1 else None
            for comparison, (lane, states) in zip(comparisons, compared, strict=True):
                comparison.add(logits(lane, states[row, part]), targets, true)
    return comparisons


def _check_same_shape(models: list[DenseModel]) -> None:
    for name in ("vocab_size", "num_layers", "hidden_size"):
        values = {getattr(model.spec, name) for model in models}
        if len(values) > 1:
            reference, found = models
            raise CheckpointError(
                f"{found.checkpoint.path} has a {name} of {getattr(found.spec, name):,} and the "
                f"reference {reference.checkpoint.path} one of {getattr(reference.spec, name):,}; "
                "give the checkpoint that this one was made from"
            )


def _check_same_tokens(path: Path, reference: Path) -> None:
    """By the files first: most often one is the other's copy."""
    files = [each / "tokenizer.json" for each in (path, reference)]
    if not all(file.is_file() for file in files):
        return  # the vocabulary's size is still compared
    if files[0].read_bytes() == files[1].read_bytes():
        return
    if not Tokenizer.load(path).same_vocabulary(Tokenizer.load(reference)):
        raise CheckpointError(
            f"the tokenizers of {path} and of the reference {reference} have different "
            "vocabularies, so that their tokens cannot be compared; give the checkpoint that this "
            "one was made from"
        )
