"""The processes one `manta serve` starts, and their end, however it ends itself.

They inherit the name of its run directory, by which they are found even after Ray has lost them:
HAProxy survives the processes that started it. A guard, a process of its own, ends them and
removes the directory when `manta serve` is killed. This file run as a program is that guard, so
it needs the standard library only.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

RUN_DIR = "MANTA_RUN_DIR"  # in the environment of each of them
POLL_S = 0.05
PATIENCE_S = 1.0  # from SIGTERM to SIGKILL
ROUNDS = 2  # the second for what a process started while it was being ended

Processes = dict[int, str]  # pid → name and start time, which tell it from a later one


class Guard:
    """Owns the run directory. When it is left, or this process dies, both it and all processes
    that name it in their environment are gone."""

    def __init__(self) -> None:
        # Not TMPDIR: HAProxy's sockets lie in it, and their paths end at 107 characters. Only its
        # owner may enter, because those sockets let anyone in who reaches them.
        self.run_dir = Path(tempfile.mkdtemp(prefix="manta-", dir="/tmp"))
        self._process = subprocess.Popen(
            [sys.executable, "-IS", __file__, self.run_dir],
            stdin=subprocess.PIPE,  # nothing is written: it closes when this process ends
            start_new_session=True,  # neither a Ctrl-C nor a closed terminal reaches it
            env={name: value for name, value in os.environ.items() if name != RUN_DIR},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        clear(self.run_dir)
        self._process.communicate()


def clear(run_dir: Path) -> None:
    """End everything started with this run directory, and remove it."""
    for _ in range(ROUNDS):
        end(started_with(run_dir))
    shutil.rmtree(run_dir, ignore_errors=True)


def started_with(run_dir: Path) -> Processes:
    """Every living process whose environment names the run directory."""
    mark = f"{RUN_DIR}={run_dir}".encode()
    found: Processes = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            pid = int(environ.parent.name)
            if mark in environ.read_bytes().split(b"\0") and (identity := _identity(pid)):
                found[pid] = identity
    return found


def end(processes: Processes) -> None:
    """SIGTERM, and SIGKILL for those that do not follow it."""
    _send(processes, signal.SIGTERM)
    _send(_await_end(processes), signal.SIGKILL)
    _await_end(processes)


def _send(processes: Processes, signum: signal.Signals) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _await_end(processes: Processes) -> Processes:
    """Those that still run after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while processes := {pid: name for pid, name in processes.items() if _identity(pid) == name}:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return processes


def _identity(pid: int) -> str | None:
    """Name and start time of a process; None when it has ended (a zombie has)."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return None
    state, *fields = rest.split()
    return None if state == "Z" else f"{name.partition('(')[2]} {fields[18]}"


def _guard(run_dir: Path) -> None:
    """Wait until the process at the other end of stdin is gone."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # systemd sends them to every process of a service
    sys.stdin.buffer.read()
    clear(run_dir)


if __name__ == "__main__":
    _guard(Path(sys.argv[1]))
