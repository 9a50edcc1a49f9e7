"""Open requests as the replica keeps them, so that they outlive the engine that computes them.

OpenRequest is the mailbox of one HTTP request. OpenSequence is what another engine needs to go on
with one of its sequences: the request and every token reported so far. Knows no engine.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from engine.batcher import queue_full
from engine.config import EngineConfig
from engine.errors import EngineDeadError, EngineKilledError
from engine.outputs import SequenceOutput
from engine.sequence import EngineRequest

# A sequence that so many engines died computing, without a token in between, is the next one's
# only one until it gains a token.
SUSPECT_DEATHS = 2


@dataclass(slots=True)
class Load:
    """Of one engine, or a part of it."""

    num_sequences: int = 0
    num_waiting_tokens: int = 0


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
        self._load = Load()
        self._num_waiting_tokens = 0

    def count_in(self, load: Load, num_waiting_tokens: int) -> None:
        """Keep in `load` what this request adds to it: tokens until the first output."""
        self._load, self._num_waiting_tokens = load, num_waiting_tokens
        load.num_sequences += len(self.unfinished)
        load.num_waiting_tokens += num_waiting_tokens

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
        self._end_wait()
        index = self.unfinished[output.request_id]
        if output.finish_reason is not None:
            self.end(output.request_id)
        earlier = self._outputs.setdefault(index, output)
        if earlier is not output:
            earlier.merge(output)
        self._wake()

    def end(self, request_id: str) -> bool:
        """One sequence needs no engine any more. False for one that had ended."""
        if self.unfinished.pop(request_id, None) is None:
            return False
        self._load.num_sequences -= 1
        if not self.unfinished:
            self._end_wait()
        return True

    def fail(self, error: EngineDeadError) -> None:
        """No sequence gets anything any more."""
        for request_id in list(self.unfinished):
            self.end(request_id)
        self._error = error
        self._wake()

    def _end_wait(self) -> None:
        self._load.num_waiting_tokens -= self._num_waiting_tokens
        self._num_waiting_tokens = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True, eq=False)
class OpenSequence:
    """One sequence that has not ended.

    `num_deaths` counts engines that died while they may have computed it, since it last gained a
    token. A request that kills its engine gains none.
    """

    request: EngineRequest  # as submitted first, its seed resolved
    mailbox: OpenRequest
    opened: float = field(default_factory=time.monotonic)
    token_ids: list[int] = field(default_factory=list)  # reported so far
    num_deaths: int = 0
    in_engine: bool = False

    def put(self, output: SequenceOutput) -> None:
        """Take in what the sequence gained and pass it on."""
        self.token_ids += output.token_ids
        self.num_deaths = 0
        self.mailbox.put(output)

    def to_resume(self) -> EngineRequest:
        """The request another engine goes on with, reporting only what is new."""
        if not self.token_ids:
            return replace(self.request, waited_s=time.monotonic() - self.opened)
        params = self.request.params
        if params.prompt_logprobs is not None:  # reported with the first token
            params = replace(params, prompt_logprobs=None)
        return replace(self.request, params=params, output_token_ids=list(self.token_ids))

    @property
    def is_suspect(self) -> bool:
        return self.num_deaths >= SUSPECT_DEATHS

    def blamed(self) -> SequenceOutput:
        """Its end when it keeps killing engines."""
        error = EngineKilledError(
            f"the engine died {self.num_deaths} times in a row computing this request, the last "
            "time nothing else; it is not tried again"
        )
        return SequenceOutput(self.request.request_id, finish_reason="error", error=error)


def check_queue(
    held: Iterable[OpenSequence], requests: Sequence[EngineRequest], config: EngineConfig
) -> None:
    """QueueFullError by the batcher's bounds, for what waits while there is no engine."""
    waiting = [s.request for s in held if not s.in_engine and s.num_deaths == 0]
    num_tokens = sum(len(request.prompt_token_ids) for request in (*waiting, *requests))
    error = queue_full(
        len(waiting) + len(requests) - 1,
        num_tokens,
        config.max_waiting_requests,
        config.max_waiting_tokens,
    )
    if error is not None:
        raise error
