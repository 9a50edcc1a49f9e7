"""Copies of a checkpoint's settings, on a node that has not the checkpoint.

They lie in the cache or, where its disk is full or read-only, in memory; never deleted, some MB per
version. Whole or not there. This module knows neither Ray nor what the files say.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from engine.errors import ConfigError
from engine.weights.origin import INDEX_SUFFIX, SETTINGS_SUFFIXES
from engine.weights.own_directory import check_owner, create_own, scratch_in
from engine.weights.peers import PeerError

logger = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")
SETTINGS_ID = re.compile("[0-9a-f]{16}")


class SettingsCopies:
    """`cache` is this node's directory of weights."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._directories = (cache, MEMORY / f"manta-{os.geteuid()}")

    def find(self, checkpoint: str, settings_id: str) -> Path | None:
        """The directory with these settings. PeerError for an id that cannot be one."""
        for directory in self._directories:
            check_owner(directory)
            path = directory / _name(checkpoint, settings_id)
            if path.is_dir():
                return path
        return None

    def keep(self, checkpoint: str, settings_id: str, contents: Mapping[str, bytes]) -> Path:
        """`contents` by file name. PeerError for names that are not those of settings.

        ConfigError where no disk and no memory takes them.
        """
        _check(contents)
        for directory in self._directories:
            try:
                return _write(directory / _name(checkpoint, settings_id), contents)
            except OSError as error:
                logger.warning("%s takes no settings of %s: %s", directory, checkpoint, error)
        raise ConfigError(
            f"neither weights_cache {self._cache} nor {MEMORY} takes the settings of {checkpoint}, "
            f"{sum(map(len, contents.values()))} bytes; free space there, or name another "
            "directory in weights_cache"
        )


def _name(checkpoint: str, settings_id: str) -> str:
    if not SETTINGS_ID.fullmatch(settings_id):
        raise PeerError(f"{settings_id!r} is no id of settings")
    return f"{Path(checkpoint).name}-{settings_id}.settings"


def _check(contents: Mapping[str, bytes]) -> None:
    for name in contents:
        is_settings = name.endswith(SETTINGS_SUFFIXES) and not name.endswith(INDEX_SUFFIX)
        if Path(name).name != name or not is_settings:
            raise PeerError(f"it sent {name!r}, which is no file of settings")
    if "config.json" not in contents:
        raise PeerError("it has no config.json any more")


def _write(path: Path, contents: Mapping[str, bytes]) -> Path:
    create_own(path.parent)
    with scratch_in(path.parent) as scratch:
        unfinished = Path(scratch) / path.name
        unfinished.mkdir()
        for name, content in contents.items():
            (unfinished / name).write_bytes(content)
        try:
            unfinished.rename(path)
        except OSError:
            if not path.is_dir():  # else another process brought them
                raise
    return path
