"""QuantizationJob: a dense checkpoint, layer by layer, into a quantised one that can be resumed.

Two layers are in memory at a time, and the hidden states of the calibration's samples. Whatever
ends the run, the same run goes on after the last whole layer; the result has its name only when all
of it is on the disk. It knows no method and no format from the inside, and no command line.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from engine.errors import CheckpointError
from engine.quantize.assemble import assemble, kept_tensors, stored_bytes
from engine.quantize.files import LazyTensor, disk_errors
from engine.quantize.layer import norm_names
from engine.quantize.method import LayerResult, Method
from engine.quantize.model import DenseModel
from engine.quantize.output import Output
from engine.quantize.source import (
    Source,
    check_space,
    check_work_dir,
    check_writable,
    peak_memory,
)
from engine.quantize.staging import Key, Staging
from engine.quantize.statistics import Calibration, LocalCalibration
from engine.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# What the result depends on besides source and settings, and what of it only measures.
CODE = ("quantize/*.py", "weights/formats/*.py", "weights/awq.py", "weights/matrix.py")
MEASURES = ("comparison", "evaluation", "kv_loss", "on_load", "report", "verdict")


class SavedCalibration(Calibration, Protocol):
    """Calibration states that outlast their process."""

    def save(self, path: Path) -> None: ...


class CalibrationStates(Protocol):
    """Where a calibration's hidden states live: in this process, or in several."""

    def start(self, hidden: Tensor) -> SavedCalibration:
        """From the embedded samples, float [S, T, H]."""
        ...

    def load(self, path: Path) -> SavedCalibration: ...


@dataclass(frozen=True, slots=True)
class LocalStates:
    batch_size: int = 1

    def start(self, hidden: Tensor) -> SavedCalibration:
        return LocalCalibration(hidden, self.batch_size)

    def load(self, path: Path) -> SavedCalibration:
        return LocalCalibration.load(path, self.batch_size)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What a report says of the run."""

    errors: tuple[Mapping[str, float], ...]  # of each layer by role, as the method measures them
    seconds: float  # of this run; one that was resumed counts from there
    num_layers: int  # that this run computed
    peak_memory: int  # bytes
    source_bytes: int
    checkpoint_bytes: int


Finish = Callable[[Path, JobRecord], None]  # gets the whole checkpoint before it has its name


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says how to go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationJob:
    """`settings`: all that the result depends on beside the source, as JSON.

    `samples` are the calibration's token ids [S, T]; None for a method without calibration.
    `finish` may add files to the checkpoint.
    """

    source: Source
    work_dir: Path
    method: Method
    output: Output
    settings: Mapping[str, Any]
    samples: Tensor | None = None
    states: CalibrationStates = field(default_factory=LocalStates)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # of the computation
    restart: bool = False
    overwrite: bool = False
    show_progress: bool = True
    finish: Finish | None = None

    def run(self) -> JobRecord:
        """CheckpointError or ConfigError with the mend, Interrupted for Ctrl-C.

        Then the work dir is as it was.
        """
        check_work_dir(self.work_dir, self.source.path, overwrite=self.overwrite)
        self.output.check(self.source.spec)
        staging = Staging(self._target)
        check_writable(staging.directory)
        with staging.locked(), disk_errors(staging.directory, self._needed_bytes(0)):
            return self._run(staging)

    def _run(self, staging: Staging) -> JobRecord:
        started, spec = time.monotonic(), self.source.spec
        key = self._key()
        resumed = staging.begin(key, restart=self.restart)
        done = staging.num_layers()
        check_space(staging.directory, self._needed_bytes(done))
        try:
            if not resumed:
                self._check_values()
            self._quantize(staging, done)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"stopped after {staging.num_layers()} of {spec.num_layers} layers, which are in "
                f"{staging.directory}; the same command goes on from there"
            ) from error
        if self._key() != key:
            raise CheckpointError(
                f"{self.source.path} changed while it was read; run the same command with "
                "--restart once it is whole"
            )
        layers = [staging.layer(index) for index in range(spec.num_layers)]
        target = staging.new_checkpoint()
        assemble(target, self.source.path, spec, layers, self.output.quantization_config(spec))
        record = JobRecord(
            errors=tuple(map(_read_errors, layers)),
            seconds=time.monotonic() - started,
            num_layers=spec.num_layers - done,
            peak_memory=peak_memory(),
            source_bytes=self.source.num_bytes(),
            checkpoint_bytes=sum(f.stat().st_size for f in target.glob("*.safetensors")),
        )
        if self.finish is not None:
            self.finish(target, record)
        staging.publish(self._target, overwrite=self.overwrite)
        return record

    @property
    def _target(self) -> Path:
        """`.` has no name, and a link cannot be replaced by a directory."""
        return self.work_dir.resolve()

    def _quantize(self, staging: Staging, done: int) -> None:
        """The layers from `done` on."""
        spec = self.source.spec
        with DenseModel(Checkpoint(self.source.path), spec, self.dtype, self.device) as model:
            calibration = self._calibration(staging, model, done)
            with self._bar(done, spec.num_layers, "quantising", "layer") as bar:
                for index in range(done, spec.num_layers):
                    layer = model.layer(index)
                    # A method without calibration has no samples, and takes None.
                    result = self.method.quantize_layer(layer, cast(Calibration, calibration))
                    keep = None
                    if calibration is not None and index < spec.num_layers - 1:
                        keep = calibration.save
                    metadata = {"errors": json.dumps(result.errors, sort_keys=True)}
                    staging.finish_layer(index, self._tensors(index, result), metadata, keep)
                    bar.update()
                    logger.info("quantised layer %d of %d", index + 1, spec.num_layers)

    def _calibration(
        self, staging: Staging, model: DenseModel, done: int
    ) -> SavedCalibration | None:
        if self.samples is None or done == self.source.spec.num_layers:
            return None
        if done:
            return self.states.load(staging.hidden(done))
        return self.states.start(model.embed(self.samples))

    def _tensors(self, index: int, result: LayerResult) -> dict[str, LazyTensor]:
        """All tensors of a finished layer by their names in the checkpoint."""
        spec = self.source.spec
        dtype: torch.dtype = getattr(torch, spec.dtype)
        tensors = self.output.tensors(spec, index, result.linears, result.biases)
        for key, name in norm_names(spec, index).items():
            tensors[name] = result.norms[key].to(dtype)
        return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}

    def _check_values(self) -> None:
        with self._bar(0, self.source.num_bytes(), "checking the weights", "B") as bar:
            self.source.check_values(bar.update)

    def _bar(self, done: int, total: int, what: str, unit: str) -> "tqdm[NoReturn]":
        """On a terminal's stderr, with the time that is left."""
        return tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            unit_scale=unit == "B",
            disable=None if self.show_progress else True,
        )

    def _key(self) -> Key:
        settings = {**self.settings, "dtype": str(self.dtype).removeprefix("torch.")}
        if self.samples is not None:
            digest = hashlib.sha256(self.samples.numpy().tobytes()).hexdigest()
            settings["samples"] = [*self.samples.shape, digest[:16]]
        return {
            "source": self.source.fingerprint(),
            "settings": settings,
            "code": code_version(),
            "torch": torch.__version__,
        }

    def _needed_bytes(self, done: int) -> int:
        """What the layers from `done` on, the states and the checkpoint take on the disk."""
        spec = self.source.spec
        layer = self.output.num_bytes(spec)
        with Checkpoint(self.source.path) as checkpoint:
            kept = stored_bytes(checkpoint, kept_tensors(checkpoint, spec))
        hidden = 0
        if self.samples is not None:
            hidden = self.samples.numel() * spec.hidden_size * self.dtype.itemsize
        return (2 * spec.num_layers - done) * layer + kept + 2 * hidden


@cache
def code_version() -> str:
    """Changes with the code that decides the bytes of a result."""
    digest = hashlib.sha256()
    for part in CODE:
        for path in sorted(Path(__file__).parents[1].glob(part)):
            if not path.name.startswith(MEASURES):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read_errors(layer: Path) -> Mapping[str, float]:
    with safe_open(layer, framework="pt") as file:
        errors: dict[str, float] = json.loads(file.metadata()["errors"])
    return errors
