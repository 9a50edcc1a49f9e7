"""RequestTimes: where the time of one HTTP request went, and the Server-Timing header that says so.

Only differences of one process's clock: the engine measures its own durations and reports them.
"""

import time
from dataclasses import dataclass

from engine.outputs import SequenceOutput


@dataclass(slots=True)
class RequestTimes:
    """Marks on this process's `time.perf_counter`; durations in seconds.

    A request of several sequences has the queue and prefill of the one whose token came first.
    """

    received: float  # its body was whole
    submitted: float = 0.0  # its sequences went to the engine
    first: float | None = None  # the first token arrived
    ended: float = 0.0  # it left the engine
    queue: float = 0.0
    prefill: float = 0.0

    def on_first(self, output: SequenceOutput) -> None:
        self.first = time.perf_counter()
        self.queue, self.prefill = output.queue_time, output.prefill_time

    @property
    def framework(self) -> float:
        """Validation, chat template and tokenising."""
        return self.submitted - self.received

    @property
    def decode(self) -> float | None:
        """From the first token to the last; None while it goes on, and when none came."""
        return self.ended - self.first if self.ended and self.first is not None else None

    def server_timing(self) -> str:
        """The header's value. What `total` has beyond the others is Ray and text."""
        parts = {"framework": self.framework, "queue": self.queue, "prefill": self.prefill}
        if self.decode is not None:
            parts["decode"] = self.decode
        parts["total"] = time.perf_counter() - self.received
        return ", ".join(f"{name};dur={1000 * seconds:.3f}" for name, seconds in parts.items())
