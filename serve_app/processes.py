"""The processes below this one, and their end: HAProxy has outlived Ray on a busy machine."""

import contextlib
import os
import signal
import time
from pathlib import Path

POLL_S = 0.05

Processes = dict[int, str]  # pid → name and start time, which tell it from a later one


def descendants(pid: int) -> Processes:
    """Every living process below `pid`."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, layer = set[int](), {pid}
    while layer:
        layer = {child for child, parent in parents.items() if parent in layer}
        found |= layer
    return {child: identity for child in found if (identity := _identity(child)) is not None}


def await_end(processes: Processes, patience_s: float) -> Processes:
    """Those that still run after at most `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while processes := {pid: name for pid, name in processes.items() if _identity(pid) == name}:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return processes


def end(processes: Processes, patience_s: float) -> None:
    """Kill those that do not end by themselves in `patience_s` seconds."""
    for pid in await_end(processes, patience_s):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _identity(pid: int) -> str | None:
    """Name and start time of a process; None when it has ended (a zombie has)."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return None
    state, *fields = rest.split()
    return None if state == "Z" else f"{name.partition('(')[2]} {fields[18]}"
