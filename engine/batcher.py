"""RequestBatcher: the thread that keeps an engine stepping, with bounded admission in front.

Requests arrive at any time from any thread and join the next step; outputs collect, merged per
sequence, until somebody takes them, so that a slow reader gets fewer, larger reports. Owns the
inbox, the outbox and the loop's health. Only the loop thread changes the engine.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.engine import Engine
from engine.errors import EngineDeadError, InvalidRequestError, QueueFullError
from engine.outputs import EngineStats, SequenceOutput
from engine.sequence import EngineRequest

logger = logging.getLogger(__name__)


class RequestBatcher:
    """`on_output` is called from the loop thread whenever `take` has something new."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting_requests: int,
        max_waiting_tokens: int,
        step_timeout_s: float,
        on_output: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._step_timeout_s = step_timeout_s
        self._on_output = on_output
        self._changed = threading.Condition()  # guards everything below
        self._inbox: list[EngineRequest] = []
        self._inbox_tokens = 0
        self._aborts: list[str] = []
        self._outbox: dict[str, SequenceOutput] = {}
        self._stats = EngineStats()
        self._failure: EngineDeadError | None = None
        self._stopping = False
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[EngineRequest], *, admitted: bool = False) -> None:
        """Queue requests. One that does not fit the queue gets an output with QueueFullError.

        `admitted` requests always fit: another engine had taken them in, and died.
        """
        now = time.monotonic()
        with self._changed:
            for request in requests:
                error = None if admitted else self._admission_error(request)
                if error is None:
                    arrived = now - request.waited_s
                    self._inbox.append(replace(request, arrival_time=arrived))
                    self._inbox_tokens += len(request.prompt_token_ids)
                else:
                    self._report_error(request.request_id, error)
            self._changed.notify()
            refused = bool(self._outbox)
        if refused:
            self._on_output()

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests before the next step; they report nothing more."""
        with self._changed:
            self._aborts += request_ids
            self._changed.notify()

    def take(self) -> tuple[list[SequenceOutput], EngineStats]:
        """What was produced since the last call. EngineDeadError once the loop has failed."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            outputs = list(self._outbox.values())
            self._outbox.clear()
            return outputs, self._stats

    def check(self) -> None:
        """EngineDeadError when the loop has failed or a step takes longer than allowed."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            started = self._step_started
        if started is not None and (took := time.monotonic() - started) > self._step_timeout_s:
            raise EngineDeadError(
                f"the engine makes no progress: its step runs for {took:.0f} s "
                f"(step_timeout_s is {self._step_timeout_s})"
            )

    def stop(self) -> None:
        """Finish the step that runs, then end the loop."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # -- the loop ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._accept():
                self._step()
        except Exception as error:
            logger.exception("the engine loop failed")
            with self._changed:
                self._failure = EngineDeadError(f"{type(error).__name__}: {error}")
            self._on_output()

    def _accept(self) -> bool:
        """Wait until there is work, then hand new requests and aborts to the engine."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._aborts or self._stopping or self._engine.has_work
            )
            if self._stopping:
                return False
            requests, self._inbox, self._inbox_tokens = self._inbox, [], 0
            aborts, self._aborts = self._aborts, []
            for request in requests:
                self._add(request)
            for request_id in aborts:
                self._engine.abort(request_id)
                self._outbox.pop(request_id, None)
            self._stats = self._engine.stats()
        return True

    def _add(self, request: EngineRequest) -> None:
        try:
            self._engine.add(request)
        except InvalidRequestError as error:
            self._report_error(request.request_id, error)

    def _step(self) -> None:
        outputs: list[SequenceOutput] = []
        if self._engine.has_work:
            self._step_started = time.monotonic()
            outputs = self._engine.step()
            self._step_started = None
        with self._changed:
            for output in outputs:
                earlier = self._outbox.setdefault(output.request_id, output)
                if earlier is not output:
                    earlier.merge(output)
            self._stats = self._engine.stats()
        self._on_output()

    def _admission_error(self, request: EngineRequest) -> QueueFullError | EngineDeadError | None:
        if self._failure is not None:
            return self._failure
        # Two reads of plain ints the loop thread may be changing: off by one at worst, whereas a
        # snapshot taken before a step would count the sequences that step has just admitted.
        num_waiting = len(self._inbox) + self._engine.num_waiting
        num_tokens = self._inbox_tokens + self._engine.num_waiting_tokens
        num_tokens += len(request.prompt_token_ids)
        return queue_full(
            num_waiting, num_tokens, self._max_waiting_requests, self._max_waiting_tokens
        )

    def _report_error(self, request_id: str, error: Exception) -> None:
        self._outbox[request_id] = SequenceOutput(request_id, finish_reason="error", error=error)


def queue_full(
    num_waiting: int, num_tokens: int, max_waiting_requests: int, max_waiting_tokens: int
) -> QueueFullError | None:
    """Why no more may wait, if so. `num_tokens` counts the prompt that would join."""
    if num_waiting >= max_waiting_requests:
        return QueueFullError(
            f"{num_waiting} requests are waiting and max_waiting_requests is "
            f"{max_waiting_requests}; try again later"
        )
    if num_waiting > 0 and num_tokens > max_waiting_tokens:
        return QueueFullError(
            f"{num_tokens} prompt tokens would be waiting and max_waiting_tokens is "
            f"{max_waiting_tokens}; try again later"
        )
    return None
