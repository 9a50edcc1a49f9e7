"""Generation: the sequences of one HTTP request, as text.

Submits prompts × n sequences, follows each through its TextStream, aborts those that a stop
string ended, and counts. Whoever uses it as a context manager leaves nothing running behind,
whichever way the request ends. Knows no protocol: chats and completions differ outside.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from engine.completion import CompletionStream, sequence_requests
from engine.outputs import SequenceOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from serve_app.metrics import SequenceTimer
from serve_app.request_times import RequestTimes
from serve_app.served_model import ServedModel
from serve_app.tracing import Operation, RequestTracer, request_attributes

if TYPE_CHECKING:
    from serve_app.event_ids import EventIds

logger = logging.getLogger("ray.serve")

SESSION_HEADER = "x-session-id"  # Serve's own name for it: requests of a session stay together
FinishReason = Literal["stop", "length"]


@dataclass(slots=True)  # not frozen: that would cost 1 µs per token
class Delta:
    """What choice `index` gained. `stop_reason`: the stop string or stop_token_ids entry."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None

    @classmethod
    def join(cls, deltas: Sequence["Delta"]) -> "Delta":
        """All of one choice as one."""
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        return cls(
            deltas[0].index,
            "".join(delta.text for delta in deltas),
            [token_id for delta in deltas for token_id in delta.token_ids],
            None if deltas[0].logprobs is None else logprobs,
            deltas[0].prompt_logprobs,
            deltas[-1].finish_reason,
            deltas[-1].stop_reason,
        )


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Of all choices; a prompt counts once, whatever n."""

    prompt: int
    completion: int
    cached: int


class Generation:
    """Choice i answers prompt i // n. Enter it to submit, leave it to abort what is left."""

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        operation: Operation,
        request_id: str,
        received: float,
        cache_salt: str | None = None,
        user: str | None = None,
        session_id: str | None = None,
        events: "EventIds | None" = None,
    ) -> None:
        if events is not None:
            params = replace(params, seed=events.seed)
        self.events = events
        self.request_id = request_id
        self.times = RequestTimes(received)
        self.prompts = prompts
        self.n = params.n
        self.num_choices = len(prompts) * params.n
        self._user = user
        self._operation: Operation = operation
        self._params = params
        self._session_id = session_id
        self._model = model
        self._requests = [
            request
            for index, prompt in enumerate(prompts)
            for request in sequence_requests(
                [f"{request_id}-{index * params.n + i}" for i in range(params.n)],
                prompt,
                params,
                model.tokenizer.eos_token_ids,
                cache_salt,
            )
        ]
        self._choices = [_Choice(model, request) for request in self._requests]
        self._num_open = self.num_choices

    def __enter__(self) -> "Generation":
        self.times.submitted = time.perf_counter()
        self._model.metrics.framework.observe(self.times.framework)
        self._model.metrics.record_seconds("framework", self.times.framework)
        if self._model.tracer is not None:
            self._trace_context = self._model.tracer.context()
        self._open = self._model.engine.open(self._requests, self._session_id)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.times.ended = time.perf_counter()
        self._model.engine.close(self._open)
        for choice in self._choices:
            choice.end("abort")  # those that have ended already say so
        if logger.isEnabledFor(logging.INFO):
            self._log()
        if self._model.tracer is not None:
            self._trace(self._model.tracer, error)

    async def next(self) -> list[Delta]:
        """What arrived since the last call; waits for something; [] when all choices ended.

        Raises the engine's error for any of the sequences: the request fails as a whole.
        """
        while self._num_open:
            deltas: list[Delta] = []
            for index, output in await self._open.take():
                if output.error is not None:
                    self._choices[index].end("error")
                    raise output.error
                outputs = [output] if self.events is None else self.events.split(index, output)
                for part in outputs:
                    if not self._choices[index].ended:
                        deltas.append(self._advance(index, part))
            if deltas:
                return deltas
        return []

    async def run(self) -> list[Delta]:
        """Generate to the end: one Delta per choice that holds all of it."""
        pieces: list[list[Delta]] = [[] for _ in range(self.num_choices)]
        with self:
            while deltas := await self.next():
                for delta in deltas:
                    pieces[delta.index].append(delta)
        return [Delta.join(of_choice) for of_choice in pieces]

    def counts(self) -> TokenCounts:
        return TokenCounts(
            prompt=sum(len(prompt) for prompt in self.prompts),
            completion=sum(choice.num_tokens for choice in self._choices),
            cached=sum(choice.num_cached_tokens for choice in self._choices[:: self.n]),
        )

    def _log(self) -> None:
        """One line per request; never its text."""
        counts = self.counts()
        logger.info(
            "%s prompt=%d cached=%d completion=%d %s%s",
            self.request_id,
            counts.prompt,
            counts.cached,
            counts.completion,
            ",".join(choice.ended for choice in self._choices),
            f" user={self._user!r}" if self._user else "",
        )

    def _trace(self, tracer: RequestTracer, error: BaseException | None) -> None:
        counts = self.counts()
        tracer.record(
            self._trace_context,
            f"{self._operation} {self._model.name}",
            self.times,
            request_attributes(self._operation, self._model.name, self._params)
            | {
                "gen_ai.response.id": self.request_id,
                "gen_ai.response.finish_reasons": [choice.ended for choice in self._choices],
                "gen_ai.usage.input_tokens": counts.prompt,
                "gen_ai.usage.output_tokens": counts.completion,
                "gen_ai.usage.cache_read.input_tokens": counts.cached,
            },
            error,
        )

    def _advance(self, index: int, output: SequenceOutput) -> Delta:
        if self.times.first is None:
            self.times.on_first(output)
        choice = self._choices[index]
        delta = choice.advance(index, output)
        if delta.finish_reason is not None:
            self._num_open -= 1
            if output.finish_reason is None:  # a stop string ended it
                self._model.engine.abort(self._open, output.request_id)
        return delta


def num_scores(deltas: Sequence[Delta]) -> int:
    """How many log probabilities there are to describe."""
    entries = [
        e for delta in deltas for e in (*(delta.logprobs or ()), *(delta.prompt_logprobs or ()))
    ]
    return sum(1 + len(entry.top_token_ids) for entry in entries if entry is not None)


class _Choice:
    """One sequence: its text, counters and times."""

    def __init__(self, model: ServedModel, request: EngineRequest) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.ended: Literal["", "stop", "length", "abort", "error"] = ""
        self._stream = CompletionStream(model.tokenizer, request)
        self._timer = SequenceTimer(model.metrics, len(request.prompt_token_ids))

    def advance(self, index: int, output: SequenceOutput) -> Delta:
        self._timer.on_output(output)
        self.num_cached_tokens += output.num_cached_tokens  # not zero in the first output only
        added = self._stream.push(output)
        self.num_tokens += len(added.token_ids)
        finish_reason = None if added.finish_reason is None else _public(added.finish_reason)
        if finish_reason is not None:
            self.end(finish_reason)
        return Delta(
            index,
            added.text,
            added.token_ids,
            added.logprobs,
            output.prompt_logprobs,
            finish_reason,
            added.stop_reason,
        )

    def end(self, reason: Literal["stop", "length", "abort", "error"]) -> None:
        """Close the books once; later calls do nothing."""
        if not self.ended:
            self.ended = reason
            self._timer.on_end(self.num_tokens, reason)


def _public(reason: str) -> FinishReason:
    """Errors and aborts never get here: they end the request, not a choice."""
    return "length" if reason == "length" else "stop"
