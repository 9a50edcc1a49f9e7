"""Origin: a checkpoint, which may lie on another node, and what tells it from any other.

Its weights are known by the names, sizes and times of change of their files. Everything else that
an engine or a replica reads of it (config.json, the tokenizer) is small: its settings, which a node
without the checkpoint has as copies. This module reads no content and knows no Ray.
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


@dataclass(frozen=True, slots=True)
class Origin:
    checkpoint: str  # its directory, resolved where it lies
    files: Fingerprint  # of its weights
    settings: Path  # on this node: its directory, or copies of its settings
    settings_id: str  # changes when they do
    here: bool  # whether its weights are on this node

    @classmethod
    def at(cls, path: Path) -> "Origin":
        """A checkpoint of this node."""
        settings = fingerprint(*settings_files(path))
        resolved = str(path.resolve())
        digest = hashlib.sha256(json.dumps([resolved, settings]).encode()).hexdigest()[:16]
        return cls(resolved, weights_fingerprint(path), path, digest, here=True)

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
