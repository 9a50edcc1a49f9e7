"""Origin: a checkpoint, which may lie on another node, and what tells it from any other.

Its weights are known by the names, sizes and times of change of their files. Everything else that
an engine or a replica reads of it (config.json, the tokenizer) is small: its settings, which a node
without the checkpoint has as copies. This module reads only samples of content and knows no Ray.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Fingerprint: TypeAlias = list[list[str | int]]

# Never code: *.py files of a checkpoint are not run and not copied.
SETTINGS_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
INDEX_SUFFIX = ".safetensors.index.json"
NUM_SAMPLES = 4  # of each file; training further changes nearly every byte
SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Origin:
    checkpoint: str  # its directory, resolved where it lies
    files: Fingerprint  # of its weights
    settings: Path  # on this node: its directory, or copies of its settings
    settings_id: str  # changes when they do
    weights_id: str  # the same for equal weights wherever they lie: a hash of samples of them
    here: bool  # whether its weights are on this node

    @classmethod
    def at(cls, path: Path) -> "Origin":
        """A checkpoint of this node."""
        settings = fingerprint(*settings_files(path))
        resolved = str(path.resolve())
        digest = hashlib.sha256(json.dumps([resolved, settings]).encode()).hexdigest()[:16]
        files = weights_fingerprint(path)
        return cls(resolved, files, path, digest, _weights_id(path, files), here=True)

    @property
    def has_weights(self) -> bool:
        """Not an index alone, which may have been copied with the settings."""
        return any(not str(name).endswith(INDEX_SUFFIX) for name, *_ in self.files)


def weights_fingerprint(path: Path) -> Fingerprint:
    """Of the files that hold weights.

    Headers would not do: a model trained further has the same. Sums of the content would read
    all of it at every start, 0.7 s per GB; writing a file changes its time.
    """
    return fingerprint(*path.glob("*.safetensors"), *path.glob(f"*{INDEX_SUFFIX}"))


def _weights_id(path: Path, files: Fingerprint) -> str:
    """Without times, which differ between nodes that fetched a checkpoint each for itself."""
    digest = hashlib.sha256(json.dumps([[name, size] for name, size, _ in files]).encode())
    for name, size, _ in files:
        with (path / str(name)).open("rb") as file:
            for part in range(1, NUM_SAMPLES + 1):
                file.seek(max(0, int(size) * part // NUM_SAMPLES - SAMPLE_BYTES))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def settings_files(path: Path) -> list[Path]:
    """The small files of a checkpoint that an engine or a replica may read."""
    return [
        file
        for suffix in SETTINGS_SUFFIXES
        for file in path.glob(f"*{suffix}")
        if not file.name.endswith(INDEX_SUFFIX)
    ]


def fingerprint(*files: Path) -> Fingerprint:
    """Name, size and time of change of each."""
    found = [(file.name, file.stat()) for file in sorted(files) if file.is_file()]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in found]
