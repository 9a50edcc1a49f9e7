"""Progress: one line on a terminal that says what is being waited for, and for how long."""

import sys
import threading
import time
from types import TracebackType
from typing import Self

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
INTERVAL_S = 0.1


class Progress:
    """Writes to a terminal's stderr only, and leaves nothing behind."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._started = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)

    def say(self, stage: str) -> None:
        self._stage = stage

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _spin(self) -> None:
        frame = 0
        while not self._done.wait(INTERVAL_S):
            frame = (frame + 1) % len(FRAMES)
            seconds = time.monotonic() - self._started
            sys.stderr.write(f"\r\x1b[K{FRAMES[frame]} {self._stage} ({seconds:.0f} s)")
            sys.stderr.flush()
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
