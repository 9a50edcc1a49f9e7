"""A trace exporter for tests: every span is a line of JSON in the file that MANTA_SPANS names."""

import os

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor


def exporter() -> list[SpanProcessor]:
    out = open(os.environ["MANTA_SPANS"], "a", buffering=1)  # noqa: SIM115 - for the process's life

    def line(span: ReadableSpan) -> str:
        return f"{span.to_json(indent=None)}\n"

    return [SimpleSpanProcessor(ConsoleSpanExporter(out=out, formatter=line))]
