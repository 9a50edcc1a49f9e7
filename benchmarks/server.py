"""A server that a benchmark starts, waits for and ends."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MANTA = str(Path(sys.executable).with_name("manta"))
START_S = 300
POLL_S = 0.5


@contextmanager
def running(
    command: Sequence[str], *urls: str, num_answers: int = 1, cwd: str | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """The process, once each of `urls` has answered so often at /health; ends with SIGINT.

    It gets no variable of Ray's: what this process has set for its own is none of its business.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(command, cwd=cwd, env=kept, stdout=subprocess.DEVNULL)
    try:
        for url in urls:
            _wait(url, num_answers, process)
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _wait(url: str, num_answers: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while num_answers:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start; run it by itself: {process.args!r}")
        num_answers -= _healthy(url)
        time.sleep(POLL_S)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
