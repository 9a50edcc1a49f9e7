"""RequestTracer: a span per request of the completion routes, in Ray Serve's tracing.

`tracing_config` in serve_config.yaml switches it on: Serve then makes a span for every request
that reaches a replica, child of the client's `traceparent` header, and ours are children of that.
They are made when a request has ended, so that the token path carries nothing; without tracing
nothing is imported or computed. Attributes are those of OpenTelemetry's GenAI conventions,
latencies have vLLM's names. Prompts and answers are never recorded.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

from engine.sampling_params import SamplingParams
from serve_app.request_times import RequestTimes

if TYPE_CHECKING:
    from opentelemetry.context import Context

Operation: TypeAlias = Literal["chat", "text_completion"]
Value: TypeAlias = str | int | float | list[str]


class RequestTracer:
    @classmethod
    def create(cls) -> "RequestTracer | None":
        """None while tracing is off. Ask in a replica, which Serve has set up."""
        from ray.serve._private.tracing_utils import is_tracing_enabled

        return cls() if is_tracing_enabled() else None

    def __init__(self) -> None:
        from opentelemetry import context, trace

        self._context = context
        self._trace = trace
        self._tracer = trace.get_tracer("manta")

    def context(self) -> "Context":
        """What is current in the request's task: Serve's span."""
        return self._context.get_current()

    def record(
        self,
        parent: "Context",
        name: str,
        times: RequestTimes,
        attributes: dict[str, Value],
        error: BaseException | None,
    ) -> None:
        """A request that has just ended."""
        now = time.time_ns()

        def at(mark: float) -> int:
            return now - int((times.ended - mark) * 1e9)

        span = self._tracer.start_span(
            name, parent, self._trace.SpanKind.INTERNAL, start_time=at(times.received)
        )
        if span.is_recording():
            span.set_attributes({**attributes, **dict(_latencies(times))})
            if times.first is not None:
                span.add_event("first token", timestamp=at(times.first))
            if isinstance(error, Exception):  # not a client that left
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(self._trace.StatusCode.ERROR, str(error))
        span.end(now)


def request_attributes(
    operation: Operation, model: str, params: SamplingParams
) -> dict[str, Value]:
    """What was asked for; what was left open is left out."""
    asked = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k if params.top_k > 0 else None,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "seed": params.seed,
        "choice.count": params.n if params.n > 1 else None,
    }
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "manta",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        **{f"gen_ai.request.{key}": value for key, value in asked.items() if value is not None},
    }


def _latencies(times: RequestTimes) -> Iterator[tuple[str, float]]:
    """Seconds."""
    if times.first is None:
        return
    yield "gen_ai.response.time_to_first_chunk", times.first - times.received
    yield "gen_ai.latency.time_in_framework", times.framework
    yield "gen_ai.latency.time_in_queue", times.queue
    yield "gen_ai.latency.time_in_model_prefill", times.prefill
    yield "gen_ai.latency.time_in_model_decode", times.ended - times.first
    yield "gen_ai.latency.e2e", times.ended - times.received
