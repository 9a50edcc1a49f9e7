"""Calibration over Ray actors: each holds a part of the samples, and their statistics are added.

A worker computes what LocalCalibration computes, over its samples; sums of the parts differ from
those of the whole by rounding. The finished layers are the driver's, so that a run whose worker
dies goes on where it was. Nothing here knows a method.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from torch import Tensor

from engine.errors import ConfigError, EngineDeadError, MantaError
from engine.models.spec import DecoderSpec
from engine.quantize.layer import ROLES, DenseLayer
from engine.quantize.statistics import LocalCalibration, Statistics

# Weights that the input of a stage is computed with; every layer needs q, by which it knows its
# device. Norms and biases are small and always sent when they changed.
NEEDED = {
    "qkv": ("q",),
    "o": ("q", "k", "v"),
    "gate_up": ("q", "k", "v", "o"),
    "down": ("q", "k", "v", "o", "gate", "up"),
}
START_TIMEOUT_S = 120.0

Parts: TypeAlias = dict[str, dict[str, Tensor]]  # weights, biases and norms by name
Actor: TypeAlias = "ActorHandle[CalibrationWorker]"


class CalibrationWorker:
    """One actor: its samples, and the layer as far as it was sent."""

    def __init__(
        self, spec: DecoderSpec, hidden: Tensor, batch_size: int, device: str, num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        # What Ray deserialises cannot be written to.
        self._calibration = LocalCalibration(hidden.clone(), batch_size)
        self._spec = spec
        self._device = device
        self._layer: DenseLayer | None = None

    def ready(self) -> None:
        """Returns once the samples are here."""

    def statistics(self, index: int, parts: Parts, stage: str) -> Statistics:
        found = self._calibration.statistics(self._updated(index, parts), stage)
        return cast(Statistics, on_device(found, "cpu"))

    def advance(self, index: int, parts: Parts) -> None:
        self._calibration.advance(self._updated(index, parts))
        self._layer = None

    def hidden(self) -> Tensor:
        return self._calibration.hidden

    def compute(self, function: Callable[..., Any], rows: Tensor, *shared: Any) -> Any:
        """A method's work on some rows, with what all rows share."""
        return on_device(function(*on_device((rows, *shared), self._device)), "cpu")

    def _updated(self, index: int, parts: Parts) -> DenseLayer:
        if self._layer is None or self._layer.index != index:
            self._layer = DenseLayer(self._spec, index, {}, {}, {})
        for name, tensors in parts.items():
            kept: dict[str, Tensor] = getattr(self._layer, name)
            kept.update({key: tensor.to(self._device) for key, tensor in tensors.items()})
        return self._layer


class RayCalibration:
    """The driver's side: `engine.quantize.statistics.Calibration` over all workers."""

    def __init__(self, actors: list[Actor]) -> None:
        self._actors = actors
        self._sent: dict[tuple[str, str], tuple[Tensor, int]] = {}

    def statistics(self, layer: DenseLayer, stage: str) -> Statistics:
        """Added in the workers' order."""
        parts = ray.put(self._changed(layer, NEEDED[stage]))
        found = _gather(
            [each.statistics.remote(layer.index, parts, stage) for each in self._actors]
        )
        total = found[0]
        for each in found[1:]:
            total = total + each
        return cast(Statistics, on_device(total, str(layer.device)))

    def advance(self, layer: DenseLayer) -> None:
        parts = ray.put(self._changed(layer, ROLES))
        _gather([each.advance.remote(layer.index, parts) for each in self._actors])
        self._sent = {}

    def save(self, path: Path) -> None:
        """The file is that of one process, which can go on from it, and any number of workers."""
        hidden = torch.cat(_gather([each.hidden.remote() for each in self._actors]))
        LocalCalibration(hidden).save(path)

    def _changed(self, layer: DenseLayer, roles: tuple[str, ...]) -> Parts:
        """What the workers have not seen, or not as it is now."""
        found: Parts = {"weights": {}, "biases": {}, "norms": {}}
        for kind, tensors in (
            ("weights", {role: layer.weights[role] for role in roles}),
            ("biases", layer.biases),
            ("norms", layer.norms),
        ):
            for name, tensor in tensors.items():
                # A tensor that was written to in place is the same object with a new version.
                seen = self._sent.get((kind, name))
                if seen is None or seen[0] is not tensor or seen[1] != tensor._version:
                    self._sent[kind, name] = (tensor, tensor._version)
                    found[kind][name] = tensor.detach().cpu()
        return found


@dataclass(slots=True)
class RayStates:
    """Starts the workers. A context manager, which ends them."""

    spec: DecoderSpec
    num_workers: int
    batch_size: int = 1
    device: str = "cpu"
    _actors: list[Actor] = field(default_factory=list)

    def __enter__(self) -> "RayStates":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def start(self, hidden: Tensor) -> RayCalibration:
        """ConfigError when there are fewer samples than workers, or no room for those."""
        if hidden.shape[0] < self.num_workers:
            raise ConfigError(
                f"--num-workers {self.num_workers} is more than the {hidden.shape[0]} calibration "
                "samples; every worker needs one"
            )
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        worker: Any = ray.remote(CalibrationWorker)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        num_cpus = int(resources.get("CPU", 1))
        num_threads = max(1, num_cpus // self.num_workers)
        options = {"num_gpus": 1} if self.device == "cuda" else {"num_cpus": 1}
        self._actors = [
            worker.options(**options).remote(
                self.spec, part, self.batch_size, self.device, num_threads
            )
            for part in torch.tensor_split(hidden, self.num_workers)
        ]
        starting: list[Any] = [actor.ready.remote() for actor in self._actors]
        ready, _ = ray.wait(starting, num_returns=len(starting), timeout=START_TIMEOUT_S)
        if len(ready) < len(starting):
            raise ConfigError(
                f"Ray started {len(ready)} of {self.num_workers} workers, which need {options} "
                f"each, in {START_TIMEOUT_S:.0f} s; its cluster has {resources}. Use fewer "
                "--num-workers"
            )
        _gather(starting)
        return RayCalibration(self._actors)

    def compute(
        self, function: Callable[..., Any], parts: Sequence[Tensor], *shared: Any
    ) -> list[Any]:
        """`engine.ray_rows.Workers`; what is shared is sent once to each node."""
        references = [ray.put(each) for each in on_device(shared, "cpu")]
        return _gather(
            [
                actor.compute.remote(function, part, *references)
                for actor, part in zip(self._actors, parts, strict=False)
            ]
        )

    def load(self, path: Path) -> RayCalibration:
        return self.start(LocalCalibration.load(path).hidden)


def on_device(value: Any, device: str) -> Any:
    """Tensors, and what is made of them: lists, tuples, statistics and matrices."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(on_device(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: on_device(part, device) for name, part in parts.items()})
    return value


def _gather(calls: list[Any]) -> list[Any]:
    """All results, in their order; the first error of ours as it is, a death by name."""
    with _worker_errors():
        found: list[Any] = ray.get(calls)
    return found


@contextmanager
def _worker_errors() -> Iterator[None]:
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, MantaError):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise EngineDeadError(
            "a worker of the calibration died (out of memory, or its node is gone); run the same "
            "command again, which goes on after the last whole layer, or use fewer --num-workers: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: RayError) -> str:
    return str(error).strip().partition("\n")[0]
