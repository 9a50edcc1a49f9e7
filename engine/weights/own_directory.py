"""A directory that only this user may write to: what lies there is computed with."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from engine.errors import ConfigError

OTHERS_WRITE = 0o022
SCRATCH = "unfinished-"
SCRATCH_LEFT_S = 3600  # nobody needs one for more than seconds


def check_owner(directory: Path) -> None:
    """ConfigError when another user owns it or may put a file there."""
    try:
        found = directory.stat()
    except OSError:  # not there yet: `create_own` makes it, or says why it cannot
        return
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"weights_cache {directory} belongs to user {found.st_uid}, this process to "
            f"{os.geteuid()}; name a directory of your own, or null"
        )
    if found.st_mode & OTHERS_WRITE:
        raise ConfigError(
            f"others may write to weights_cache {directory} (mode {found.st_mode & 0o777:o}); "
            f"run: chmod 700 {directory}"
        )


def create_own(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    check_owner(directory)


def scratch_in(directory: Path) -> tempfile.TemporaryDirectory[str]:
    """For what is renamed when it is whole."""
    return tempfile.TemporaryDirectory(prefix=SCRATCH, dir=directory)


def delete_left_scratch(directory: Path) -> None:
    """What killed processes left."""
    for path in directory.glob(f"{SCRATCH}*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > SCRATCH_LEFT_S:
                shutil.rmtree(path)
