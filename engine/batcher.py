"""RequestBatcher: the thread that keeps an engine stepping, with bounded admission in front.

Requests arrive at any time from any thread and join the next step; outputs collect, merged per
sequence, until their consumer takes them, so that a slow reader gets fewer, larger reports. Owns
the inbox, the outboxes and the loop's health. Only the loop thread changes the engine.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from engine.engine import Engine
from engine.errors import EngineDeadError, InvalidRequestError, QueueFullError
from engine.outboxes import OWNER, Outboxes
from engine.outputs import EngineStats, SequenceOutput
from engine.sequence import EngineRequest

logger = logging.getLogger(__name__)

STATS_S = 0.1  # the owner hears so often how an engine does that computes for others only
MAX_PREFIXES = 2048  # told of a cache: 16 KiB


class RequestBatcher:
    """`on_output` is called with the consumers for whom `take` has something new, from any thread.

    The owner of the engine is a consumer from the start; others `enter` and `leave`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting_requests: int,
        max_waiting_tokens: int,
        step_timeout_s: float,
        on_output: Callable[[set[str]], object],
    ) -> None:
        self._engine = engine
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._step_timeout_s = step_timeout_s
        self._on_output = on_output
        self._changed = threading.Condition()  # guards everything below
        self._inbox: list[Callable[[], None]] = []  # what to do before the next step, in order
        self._inbox_requests = 0
        self._inbox_tokens = 0
        self._outboxes = Outboxes()
        self._owner_told = 0.0
        self._prefixes: list[int] = []
        self._wants_prefixes = False
        self._stats = EngineStats()
        self._failure: EngineDeadError | None = None
        self._stopping = False
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def enter(self, consumer: str) -> None:
        with self._changed:
            self._outboxes.enter(consumer)

    def leave(self, consumer: str) -> None:
        """End a consumer's sequences before the next step; it has no outbox from then on."""
        with self._changed:
            self._inbox.append(partial(self._leave, consumer))
            self._changed.notify()

    def submit(
        self, requests: Sequence[EngineRequest], *, consumer: str = OWNER, admitted: bool = False
    ) -> None:
        """Queue requests. One that does not fit the queue gets an output with QueueFullError.

        `admitted` requests always fit: another engine had taken them in, and died.
        """
        refused = False
        now = time.monotonic()
        with self._changed:
            for request in requests:
                error = None if admitted else self._admission_error(request)
                if error is None:
                    timed = replace(request, arrival_time=now - request.waited_s)
                    self._inbox.append(partial(self._add, timed, consumer))
                    self._inbox_requests += 1
                    self._inbox_tokens += len(request.prompt_token_ids)
                else:
                    self._refuse(request, consumer, error)
                    refused = True
            self._changed.notify()
        if refused:
            self._on_output({consumer})

    def abort(self, request_ids: Sequence[str], *, consumer: str = OWNER) -> None:
        """End these requests before the next step; they report nothing more.

        An abort may overtake its submission, which has more to carry: such a one is dropped when
        it comes. Ids must not be used twice.
        """
        with self._changed:
            self._inbox.append(partial(self._abort, request_ids, consumer))
            self._changed.notify()

    def take(self, consumer: str = OWNER) -> tuple[list[SequenceOutput], EngineStats]:
        """What was produced since the last call. EngineDeadError once the loop has failed."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if consumer not in self._outboxes:
                raise EngineDeadError("this replica has left the engine")
            return self._outboxes.take(consumer), self._stats

    def prefixes(self) -> list[int]:
        """Short hashes of the cached prefixes used last, as they were when this was last asked."""
        with self._changed:
            self._wants_prefixes = True
            self._changed.notify()
            return self._prefixes

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
                consumers = self._outboxes.all()
            self._on_output(consumers)

    def _accept(self) -> bool:
        """Wait until there is work, then hand new requests and aborts to the engine."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._inbox or self._stopping or self._engine.has_work or self._wants_prefixes
                )
            )
            if self._stopping:
                return False
            commands, self._inbox = self._inbox, []
            self._inbox_requests = self._inbox_tokens = 0
            for command in commands:
                command()
            if self._wants_prefixes:
                self._wants_prefixes = False
                self._prefixes = self._engine.cached_prefixes(MAX_PREFIXES)
            self._stats = self._engine.stats()
        return True

    def _add(self, request: EngineRequest, consumer: str) -> None:
        if not self._outboxes.expects(request.request_id, consumer):
            return
        try:
            self._engine.add(request)
        except InvalidRequestError as error:
            self._refuse(request, consumer, error)
        else:
            self._outboxes.open(request.request_id, consumer)

    def _abort(self, request_ids: Sequence[str], consumer: str) -> None:
        for request_id in request_ids:
            if self._outboxes.close(request_id, consumer):
                self._engine.abort(request_id)

    def _leave(self, consumer: str) -> None:
        for request_id in self._outboxes.leave(consumer):
            self._engine.abort(request_id)

    def _step(self) -> None:
        outputs: list[SequenceOutput] = []
        if self._engine.has_work:
            self._step_started = time.monotonic()
            outputs = self._engine.step()
            self._step_started = None
        with self._changed:
            for output in outputs:
                self._outboxes.put(output)
            self._stats = self._engine.stats()
            consumers = self._outboxes.filled()
        now = time.monotonic()
        if now - self._owner_told > STATS_S or not self._engine.has_work:
            consumers.add(OWNER)
        if OWNER in consumers:
            self._owner_told = now
        self._on_output(consumers)

    def _admission_error(self, request: EngineRequest) -> QueueFullError | EngineDeadError | None:
        if self._failure is not None:
            return self._failure
        # Two reads of plain ints the loop thread may be changing: off by one at worst, whereas a
        # snapshot taken before a step would count the sequences that step has just admitted.
        num_waiting = self._inbox_requests + self._engine.num_waiting
        num_tokens = self._inbox_tokens + self._engine.num_waiting_tokens
        num_tokens += len(request.prompt_token_ids)
        return queue_full(
            num_waiting, num_tokens, self._max_waiting_requests, self._max_waiting_tokens
        )

    def _refuse(self, request: EngineRequest, consumer: str, error: Exception) -> None:
        output = SequenceOutput(request.request_id, finish_reason="error", error=error)
        self._outboxes.refuse(output, consumer)


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
