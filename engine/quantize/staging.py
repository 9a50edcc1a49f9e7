"""Staging: what a quantisation has finished so far, in a hidden directory beside its work dir.

    .NAME.partial/lock                     held by the run that works there; names its process
                  state.json               what is made from what; another run must agree
                  layer-00012.safetensors  a finished layer as the checkpoint will hold it
                  hidden-00013.safetensors the calibration's hidden states before that layer
                  checkpoint/              the whole checkpoint until it gets its name

Every file is whole or not there. The hidden states before layer i + 1 are written before layer i
is, and those before layer i go after it, so that after a kill at any point the last whole layer and
the states behind it are both there. This module knows neither models nor methods.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any, TypeAlias

from engine.errors import CheckpointError, ConfigError
from engine.quantize.files import LazyTensor, sync_directory, write_json, write_tensors

Key: TypeAlias = Mapping[str, Any]

OWN = ("lock", "state.json*", "layer-*", "hidden-*", "checkpoint", "old")  # what is made there


class Staging:
    def __init__(self, work_dir: Path) -> None:
        self.directory = work_dir.with_name(f".{work_dir.name}.partial")
        self.checkpoint = self.directory / "checkpoint"
        self._state = self.directory / "state.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone in the directory. CheckpointError while another run is."""
        with (self.directory / "lock").open("a+") as file:
            try:
                flock(file, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise CheckpointError(
                    f"process {file.read() or 'unknown'} is working in {self.directory}; wait for "
                    "it, end it, or choose another work dir"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def begin(self, key: Key, *, restart: bool) -> bool:
        """Whether work of this key is there to go on with; if there is none, it starts with it.

        CheckpointError when what is there has another key; `restart` drops it. ConfigError for
        what no run made, which is not dropped.
        """
        self._check_own()
        key = json.loads(json.dumps(key))  # as it comes back from the file
        if not restart and self._state.is_file():
            found = self._read_state()
            if found != key:
                raise CheckpointError(
                    f"{self.directory} holds an unfinished run with other settings: "
                    f"{differences(found, key)}; give the settings it was started with, or "
                    "--restart to start over"
                )
            return True
        self._clear()
        write_json(self._state, {"key": key})
        return False

    def num_layers(self) -> int:
        """Finished ones, from the first on without a gap."""
        count = 0
        while self.layer(count).is_file():
            count += 1
        return count

    def layer(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}.safetensors"

    def hidden(self, index: int) -> Path:
        """The calibration's hidden states before layer `index`."""
        return self.directory / f"hidden-{index:05d}.safetensors"

    def finish_layer(
        self,
        index: int,
        tensors: Mapping[str, LazyTensor],
        metadata: Mapping[str, str],
        write_hidden: Callable[[Path], None] | None,
    ) -> None:
        """Keep a layer, and by `write_hidden`, whole or not, the states of the next one."""
        if write_hidden is not None:
            write_hidden(self.hidden(index + 1))
        write_tensors(self.layer(index), tensors, metadata)
        self.hidden(index).unlink(missing_ok=True)

    def new_checkpoint(self) -> Path:
        """An empty directory for the finished checkpoint."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.checkpoint.mkdir()
        return self.checkpoint

    def publish(self, work_dir: Path, *, overwrite: bool) -> None:
        """Give the whole checkpoint its name, in one rename, and forget the rest."""
        sync_directory(self.checkpoint)
        old = self.directory / "old"
        if overwrite and work_dir.exists():
            work_dir.rename(old)
        try:
            self.checkpoint.rename(work_dir)
        except OSError:
            if old.exists():
                old.rename(work_dir)
            raise
        sync_directory(work_dir.parent)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _check_own(self) -> None:
        for path in self.directory.iterdir():
            if not any(path.match(pattern) for pattern in OWN):
                raise ConfigError(
                    f"{path} is no work of Manta's, and {self.directory} is to hold nothing else; "
                    "move it away, or choose another --work-dir"
                )

    def _read_state(self) -> Any:
        try:
            return json.loads(self._state.read_text())["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._state} cannot be read ({error}); give --restart to start over"
            ) from error

    def _clear(self) -> None:
        for path in self.directory.iterdir():
            if path.name == "lock":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                with suppress(FileNotFoundError):
                    path.unlink()


def differences(old: Any, new: Any, name: str = "") -> str:
    """What differs between two values of JSON, by dotted keys: `group_size was 64, now 128`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key, ...) != new.get(key, ...)]
        parts = (
            differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
            for key in keys
        )
        return ", ".join(parts)
    if isinstance(old, list) and isinstance(new, list):
        changed = [each for each in new if each not in old] or [e for e in old if e not in new]
        return f"{name} changed ({', '.join(map(str, changed[:2]))})"
    return f"{name} was {json.dumps(old)}, now {json.dumps(new)}"
