"""The source of a quantisation: a dense checkpoint, and a work dir that the result may have.

All that can be wrong with either is refused here, before any work, with the mend.
"""

import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, ConfigError
from engine.models import DecoderSpec, load_spec
from engine.models.hf_config import read_json
from engine.models.layout import HARMLESS, expected_tensors
from engine.quantize.files import disk_errors, human
from engine.weights.checkpoint import Checkpoint
from engine.weights.origin import weights_fingerprint


@dataclass(frozen=True, slots=True)
class Source:
    path: Path
    spec: DecoderSpec

    @classmethod
    def open(cls, path: Path) -> "Source":
        """CheckpointError for what is no dense checkpoint of a known family, or not whole."""
        spec = load_spec(path)
        if spec.quantization is not None:
            raise CheckpointError(
                f"{path} is already quantised: its config.json has a quantization_config; give the "
                "checkpoint in bf16, fp16 or fp32 that it was made from"
            )
        with Checkpoint(path) as checkpoint:
            own_head = f"{spec.names.head}.weight" in checkpoint.tensors
            head = own_head or not spec.tie_word_embeddings
            checkpoint.verify(expected_tensors(spec, head=head), HARMLESS)
        return cls(path, spec)

    def fingerprint(self) -> dict[str, Any]:
        """Changes when its weights or its config do."""
        return {
            "path": str(self.path.resolve()),
            "files": weights_fingerprint(self.path),
            "config": read_json(self.path / "config.json"),
        }

    def check_values(self, progress: Callable[[int], object]) -> None:
        """CheckpointError that names the first tensor with a value that is NaN or infinite.

        Reads the whole checkpoint: some GB per second, against hours until the layer is reached.
        `progress` is told of every tensor's bytes.
        """
        with Checkpoint(self.path) as checkpoint:
            for name, stored in checkpoint.tensors.items():
                tensor = checkpoint.read(name)
                finite = torch.isfinite(tensor)
                if not bool(finite.all()):
                    raise CheckpointError(
                        f"{self.path / stored.file}: the tensor {name} holds "
                        f"{int((~finite).sum())} values that are NaN or infinite; nothing can be "
                        "computed with them. Get or make the file again"
                    )
                progress(tensor.numel() * tensor.element_size())

    def num_bytes(self) -> int:
        return sum(int(size) for _, size, _ in weights_fingerprint(self.path))


def check_work_dir(work_dir: Path, source: Path, *, overwrite: bool) -> None:
    """ConfigError when the result cannot lie there."""
    target, origin = work_dir.resolve(), source.resolve()
    if target == origin:
        raise ConfigError(f"--work-dir {work_dir} is the model itself; choose another directory")
    if origin in target.parents or target in origin.parents:
        where = "inside the model's directory" if origin in target.parents else "around the model"
        raise ConfigError(f"--work-dir {work_dir} lies {where}; choose one beside it")
    if work_dir.exists() and not work_dir.is_dir():
        raise ConfigError(f"--work-dir {work_dir} is a file; choose another name")
    if os.path.ismount(target):  # the result comes from beside it in one rename
        raise ConfigError(
            f"--work-dir {work_dir} is where a disk is mounted, which nothing can replace; choose "
            "a directory in it"
        )
    if not work_dir.is_dir() or not any(work_dir.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"--work-dir {work_dir} is not empty; choose another directory, or --overwrite to "
            "replace what is there"
        )
    if not (work_dir / "config.json").is_file():
        raise ConfigError(
            f"--overwrite replaces checkpoints only, and {work_dir} has no config.json; choose "
            "another directory, or empty it yourself"
        )


def check_writable(directory: Path) -> None:
    """Make it. ConfigError when that, or a file in it, is not allowed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write to {directory}: {error.strerror}; choose another --work-dir, or change "
            "the permissions of that one"
        ) from error


def check_space(directory: Path, needed: int) -> None:
    """CheckpointError when the disk has no `needed` bytes left."""
    with disk_errors(directory, needed):
        free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{directory} has {human(free)} free, and the job needs {human(needed)} there for "
            "finished layers, the calibration's states and the checkpoint; free space, or choose a "
            "work dir on another disk"
        )


def peak_memory() -> int:
    """Bytes of memory that this process had at most, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
