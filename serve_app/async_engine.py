"""AsyncEngine: the replica's end of the engine group, and the open requests it serves.

One task polls the group for the outputs of all sequences and drops each into the mailbox of its
request; submissions and aborts made in one tick of the loop leave as one call. Single-threaded:
everything runs on the loop that created it. Knows no text and no HTTP.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import EngineDeadError
from engine.outputs import EngineStats, SequenceOutput
from engine.sequence import EngineRequest

if TYPE_CHECKING:
    from engine.ray_group import EngineGroup

logger = logging.getLogger("ray.serve")


class ShuttingDownError(EngineDeadError):
    """The replica ended its engine: the server stops, or this replica is not needed any more."""


class OpenRequest:
    """The mailbox of one HTTP request. `request_ids[i]` is its sequence i.

    What a sequence produces while nobody takes it is merged, so a slow client gets fewer and
    larger chunks, and memory stays that of its tokens.
    """

    def __init__(self, request_ids: Sequence[str]) -> None:
        self.unfinished = {request_id: index for index, request_id in enumerate(request_ids)}
        self._outputs: dict[int, SequenceOutput] = {}
        self._error: EngineDeadError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[tuple[int, SequenceOutput]]:
        """All that arrived, by sequence; waits for the first. EngineDeadError if none can come."""
        if not self._outputs and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._outputs:
            outputs, self._outputs = self._outputs, {}
            return list(outputs.items())
        assert self._error is not None
        raise self._error

    def put(self, output: SequenceOutput) -> None:
        index = self.unfinished[output.request_id]
        if output.finish_reason is not None:
            del self.unfinished[output.request_id]
        earlier = self._outputs.setdefault(index, output)
        if earlier is not output:
            earlier.merge(output)
        self._wake()

    def fail(self, error: EngineDeadError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """Owns the group, the mailboxes and the poll task. Create it inside the running loop."""

    def __init__(self, group: "EngineGroup", on_stats: Callable[[EngineStats], None]) -> None:
        self.info = group.info
        self._group = group
        self._on_stats = on_stats
        self._loop = asyncio.get_running_loop()
        self._mailboxes: dict[str, OpenRequest] = {}  # by the request id of each sequence
        self._submits: list[EngineRequest] = []
        self._aborts: list[str] = []
        self._sends: set[asyncio.Task[None]] = set()
        self._failure: EngineDeadError | None = None
        self._poll_task = self._loop.create_task(self._poll())
        self._poll_task.add_done_callback(self._on_task_end)

    def open(self, requests: Sequence[EngineRequest]) -> OpenRequest:
        """Submit the sequences of one request. Every open needs its close."""
        if self._failure is not None:
            raise self._failure
        opened = OpenRequest([request.request_id for request in requests])
        for request in requests:
            self._mailboxes[request.request_id] = opened
        self._schedule_send()
        self._submits += requests
        return opened

    def close(self, opened: OpenRequest) -> None:
        """Forget a request; what it has not finished is aborted and its blocks become free."""
        for request_id in list(opened.unfinished):
            self.abort(opened, request_id)

    def abort(self, opened: OpenRequest, request_id: str) -> None:
        """End one sequence; one that has ended by itself is ignored."""
        if opened.unfinished.pop(request_id, None) is None:
            return
        del self._mailboxes[request_id]
        self._schedule_send()
        self._aborts.append(request_id)

    @property
    def num_open(self) -> int:
        """Sequences submitted and neither finished nor aborted."""
        return len(self._mailboxes)

    async def check(self) -> None:
        """EngineDeadError when the engine is gone or makes no progress."""
        if self._failure is not None:
            raise self._failure
        await self._group.check()

    def stop(self) -> None:
        """End the engine actors; requests that are still open fail."""
        self._poll_task.cancel()
        self._fail(ShuttingDownError("the replica is shutting down"))
        self._group.stop()

    # -- the loop ---------------------------------------------------------------------------

    async def _poll(self) -> None:
        while True:
            outputs, stats = await self._group.poll()
            for output in outputs:
                self._dispatch(output)
            self._on_stats(stats)

    def _dispatch(self, output: SequenceOutput) -> None:
        mailbox = self._mailboxes.get(output.request_id)
        if mailbox is None:
            return  # aborted while this was on its way
        if output.finish_reason is not None:
            del self._mailboxes[output.request_id]
        mailbox.put(output)

    def _schedule_send(self) -> None:
        if not self._submits and not self._aborts:
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        """Hand over what this tick collected. Calls reach the actor in the order they are made."""
        aborts, self._aborts = self._aborts, []
        submits, self._submits = self._submits, []
        ended = set(aborts)
        submits = [request for request in submits if request.request_id not in ended]
        if submits:
            self._start(self._group.submit(submits))
        if aborts:
            self._start(self._group.abort(aborts))

    def _start(self, call: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(call)
        self._sends.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._sends.discard)
        task.add_done_callback(self._on_task_end)

    def _on_task_end(self, task: "asyncio.Task[None]") -> None:
        """Any call that fails means that the engine is gone, whatever the reason."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._failure is None:
            ours = isinstance(error, EngineDeadError)  # then the cause is Ray's report
            reason = f"{error}: {error.__cause__}" if ours else repr(error)
            logger.error("the engine is gone: %s", reason, exc_info=None if ours else error)
        if not isinstance(error, EngineDeadError):
            error = EngineDeadError(f"{type(error).__name__}: {error}")
        self._fail(error)

    def _fail(self, error: EngineDeadError) -> None:
        self._failure = self._failure or error
        mailboxes = set(self._mailboxes.values())
        self._mailboxes.clear()
        for mailbox in mailboxes:
            mailbox.unfinished.clear()
            mailbox.fail(self._failure)
