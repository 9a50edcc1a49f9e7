"""Memory of engine actors that this process's own cluster runs, and files in the page cache."""

import os
from contextlib import suppress
from pathlib import Path


def pss(pids: list[int]) -> int:
    """Bytes; a page of n processes counts as 1/n to each."""
    return sum(_rollup(pid, "Pss") for pid in pids)


def engine_pids() -> list[int]:
    """Children of this process's children, by Ray's process title."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        with suppress(OSError):  # it ended meanwhile
            title = (directory / "cmdline").read_bytes()
            if title.startswith(b"ray::EngineActor") and _parent(_parent(pid)) == os.getpid():
                found.append(pid)
    return found


def read(path: Path) -> None:
    """Into the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def forget(path: Path) -> None:
    """Out of the page cache, which a file that nobody maps can leave."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rollup(pid: int, name: str) -> int:
    """One number of /proc/PID/smaps_rollup, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _parent(pid: int) -> int:
    """From /proc/PID/stat, in which the name may hold spaces."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
