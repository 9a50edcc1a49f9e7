"""Exporters for `tracing_config.exporter_import_path`: Serve calls one in every process it traces.

Without a path Serve writes spans to files, beside its logs.
"""

from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor


def otlp() -> "list[SpanProcessor]":
    """To the collector at OTEL_EXPORTER_OTLP_ENDPOINT, over HTTP, in batches, from a thread."""
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            "tracing to OTLP needs a package: pip install 'manta-serve[otlp]'"
        ) from error
    return [BatchSpanProcessor(OTLPSpanExporter())]
