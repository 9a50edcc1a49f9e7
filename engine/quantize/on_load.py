"""A dense checkpoint that an engine wants quantised: made once per node, found there afterwards.

    quantized/NAME-KEY/           the quantised checkpoint, in weights_cache
              NAME-KEY.json       its sum, written last
              NAME-KEY.lock       held alone by whoever makes or deletes it, shared while it is read
              .NAME-KEY.partial/  what a run that was killed had finished: the next one goes on

The engine packs its weights from there, as from any checkpoint; text is the dense one's business.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from pathlib import Path
from typing import IO

import torch

from engine.config import EngineConfig, Quantize
from engine.errors import CheckpointError
from engine.quantize import recipes
from engine.quantize.calibration import samples
from engine.quantize.files import write_json
from engine.quantize.job import QuantizationJob, code_version
from engine.quantize.recipes import Recipe
from engine.quantize.source import Source
from engine.quantize.staging import Staging
from engine.tokenizer import Tokenizer
from engine.weights.own_directory import check_owner, create_own

logger = logging.getLogger(__name__)

DIRECTORY = "quantized"
POLL_S = 0.1  # between two tries for a lock that another process holds
NAME_HOLDER_AFTER_S = 5.0
CHUNK = 1 << 22  # bytes read at once for a sum
NUM_SAMPLES, SEQLEN = 128, 2048  # `manta lite`'s, of the built-in text


@dataclass(frozen=True, slots=True)
class Quantized:
    path: Path
    crc32: int  # of its weights: ranks of several nodes must have the same


@contextmanager
def quantized_checkpoint(config: EngineConfig, device: str) -> Iterator[Quantized]:
    """The quantised form of the config's checkpoint, which stays while the context is open.

    CheckpointError when there is no dense checkpoint on this node, or no room for the result.
    """
    directory = config.weights_cache_directory()
    assert config.quantize is not None
    assert directory is not None, "EngineConfig checks that"
    check_owner(directory)
    source = _open_source(Path(config.model), config.quantize)
    recipe = recipes.on_load(config.quantize, source.spec)
    entry = _Entry(directory / DIRECTORY / _name(source, recipe))
    create_own(directory)
    create_own(directory / DIRECTORY)
    with entry.lock.open("a+") as lock:
        _hold(lock, LOCK_SH, entry)
        if entry.crc32() is None:
            flock(lock, LOCK_UN)  # over NFS two that convert theirs would wait for each other
            _hold(lock, LOCK_EX, entry)
            if entry.crc32() is None:  # still: nobody made it while this process waited
                _make(entry, source, recipe, device)
            flock(lock, LOCK_SH)
        _delete_unused(entry, config.max_weights_cache_bytes)
        crc32 = entry.crc32()
        if crc32 is None:
            raise CheckpointError(f"{entry.path} was deleted while it was read; start again")
        yield Quantized(entry.path, crc32)


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path

    @property
    def manifest(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def lock(self) -> Path:
        return self.path.with_name(self.path.name + ".lock")

    def crc32(self) -> int | None:
        """None when it is not there, or not whole."""
        try:
            found = json.loads(self.manifest.read_text())
        except (OSError, ValueError):
            return None
        return int(found["crc32"]) if self.path.is_dir() else None

    @property
    def partial(self) -> Path:
        return Staging(self.path).directory

    def num_bytes(self) -> int:
        """Of what is finished, or as far as it is: its maker may rename and delete meanwhile."""
        total = 0
        for directory in (self.path, self.partial):
            for parent, _, names in os.walk(directory):
                for name in names:
                    with suppress(FileNotFoundError):
                        total += os.stat(os.path.join(parent, name)).st_size
        return total

    def used_at(self) -> float:
        return self.lock.stat().st_mtime

    def delete(self) -> None:
        self.manifest.unlink(missing_ok=True)
        for directory in (self.path, self.partial):
            shutil.rmtree(directory, ignore_errors=True)


def _open_source(path: Path, quantize: Quantize) -> Source:
    if not path.is_dir():
        raise CheckpointError(
            f"quantize {quantize} reads the dense checkpoint on every node with a rank, and {path} "
            "is not on this one; copy it here, or quantise once with `manta lite` and serve that"
        )
    return Source.open(path)


def _name(source: Source, recipe: Recipe) -> str:
    """Different for everything that the bytes depend on."""
    depends_on = [source.fingerprint(), recipe.settings, code_version(), torch.__version__]
    parts = json.dumps(depends_on, sort_keys=True)
    digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
    model = re.sub(r"[^\w.-]", "_", source.path.resolve().name)[:80]
    return f"{model}-{recipe.name}-{digest}"


def _make(entry: _Entry, source: Source, recipe: Recipe, device: str) -> None:
    if not (entry.path / "config.json").is_file():  # else its maker died before it summed it
        _quantize(entry.path, source, recipe, device)
    write_json(entry.manifest, {"crc32": _crc32(entry.path)})


def _quantize(path: Path, source: Source, recipe: Recipe, device: str) -> None:
    logger.info("quantising %s (%s) into %s", source.path, recipe.name, path)
    tokens = None
    if recipe.calibrates:
        seqlen = min(SEQLEN, source.spec.max_position_embeddings)
        drawn = samples(Tokenizer.load(source.path), num_samples=NUM_SAMPLES, seqlen=seqlen)
        tokens = drawn.calibration
    QuantizationJob(
        source=source,
        work_dir=path,
        method=recipe.method,
        output=recipe.output,
        settings=recipe.settings,
        samples=tokens,
        device=device,
    ).run()


def _crc32(directory: Path) -> int:
    value = 0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                value = zlib.crc32(chunk, value)
    return value


def _hold(lock: IO[str], kind: int, entry: _Entry) -> None:
    """Wait for the lock, and say after a while for whom."""
    started, named = time.monotonic(), False
    while True:
        try:
            flock(lock, kind | LOCK_NB)
        except BlockingIOError:
            if not named and time.monotonic() - started > NAME_HOLDER_AFTER_S:
                named = True
                logger.warning("waiting for another process, which makes %s", entry.path)
            time.sleep(POLL_S)
            continue
        return


def _delete_unused(used: _Entry, max_bytes: int) -> None:
    """Those used longest ago, until the rest fit; never one that is being made or read.

    A lock's file stays: one that is deleted while another process opens it would lock nothing.
    """
    with suppress(OSError):
        os.utime(used.lock)
    entries = [_Entry(path.with_suffix("")) for path in used.path.parent.glob("*.lock")]
    sizes = {entry: entry.num_bytes() for entry in entries}
    excess = sum(sizes.values()) - max_bytes
    for entry in sorted(sizes, key=_Entry.used_at):
        if excess <= 0 or entry == used:
            return
        with suppress(OSError), entry.lock.open("a+") as lock:
            flock(lock, LOCK_EX | LOCK_NB)
            entry.delete()
            excess -= sizes[entry]
