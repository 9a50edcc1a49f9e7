"""A span per request with GenAI attributes, child of Serve's; nothing while tracing is off."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from engine.errors import ConfigError, QueueFullError
from engine.outputs import SequenceOutput
from serve_app import trace_exporters
from serve_app.models import Models
from serve_app.serve_schema import to_schema
from serve_app.tracing import RequestTracer
from tests.stub_engine import StubGroup, app_of, chat, client_of, make_model
from tests.test_launch import BIN, DEMO, ROOT, running

Test = Callable[[StubGroup, httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What RequestTracer exports; "server" is the current span, as Serve's is in a replica."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


def traced(checkpoint: Path, test: Test) -> None:
    async def run() -> None:
        group = StubGroup()
        models = Models(replace(make_model(group, checkpoint), tracer=RequestTracer()))
        app: FastAPI = app_of(models)
        async with app.router.lifespan_context(app), client_of(app) as client:
            with trace.get_tracer("serve").start_as_current_span("server"):
                await test(group, client)

    asyncio.run(asyncio.wait_for(run(), 30))


def ours(spans: InMemorySpanExporter) -> ReadableSpan:
    server, span = sorted(spans.get_finished_spans(), key=lambda each: each.name != "server")
    assert span.parent is not None
    assert span.parent.span_id == server.context.span_id
    assert span.context.trace_id == server.context.trace_id
    assert server.start_time < span.start_time < span.end_time < server.end_time  # type: ignore[operator]
    return span


def test_a_span_tells_of_its_request(tiny_checkpoint: Path, spans: InMemorySpanExporter) -> None:
    async def test(group: StubGroup, client: httpx.AsyncClient) -> None:
        body = chat(stream=True, max_tokens=7, seed=3, temperature=0.5)
        answer = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
        (request_id,) = await group.wait_for(1)
        group.put(SequenceOutput(request_id, [42], queue_time=0.5, prefill_time=2.0))
        await asyncio.sleep(0.01)
        group.put(SequenceOutput(request_id, [43], finish_reason="length"))
        assert (await answer).status_code == 200

    traced(tiny_checkpoint, test)
    span = ours(spans)
    found = dict(span.attributes or {})
    assert span.name == "chat tiny"
    assert span.status.status_code is StatusCode.UNSET
    assert str(found["gen_ai.response.id"]).startswith("chatcmpl-")
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.time_in_model_prefill": 2.0,
    }
    assert {name: found[name] for name in expected} == expected
    assert "gen_ai.request.choice.count" not in found
    assert 0 < found["gen_ai.response.time_to_first_chunk"] < found["gen_ai.latency.e2e"]  # type: ignore[operator]
    (event,) = span.events
    assert event.name == "first token"
    assert span.start_time < event.timestamp < span.end_time  # type: ignore[operator]


def test_a_failure_is_one(tiny_checkpoint: Path, spans: InMemorySpanExporter) -> None:
    async def test(group: StubGroup, client: httpx.AsyncClient) -> None:
        body = {"model": "tiny", "prompt": "a"}
        answer = asyncio.ensure_future(client.post("/v1/completions", json=body))
        (request_id,) = await group.wait_for(1)
        error = QueueFullError("200 requests are waiting")
        group.put(SequenceOutput(request_id, finish_reason="error", error=error))
        assert (await answer).status_code == 429

    traced(tiny_checkpoint, test)
    span = ours(spans)
    assert (span.name, span.status.status_code) == ("text_completion tiny", StatusCode.ERROR)
    assert (span.attributes or {})["error.type"] == "QueueFullError"
    assert span.events == ()


def test_a_client_that_leaves_is_none(tiny_checkpoint: Path, spans: InMemorySpanExporter) -> None:
    async def test(group: StubGroup, client: httpx.AsyncClient) -> None:
        answer = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat()))
        await group.wait_for(1)
        answer.cancel()
        await asyncio.wait([answer])

    traced(tiny_checkpoint, test)
    span = ours(spans)
    assert span.status.status_code is StatusCode.UNSET
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)


def test_without_tracing_nothing_is_imported() -> None:
    code = (
        "import sys; from serve_app import tracing, generation; "
        "sys.exit('opentelemetry.sdk' in sys.modules and 'ray' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert RequestTracer.create() is None


def test_serve_config_may_trace() -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["deployments"] = []
    tracing = {"enabled": True, "exporter_import_path": "serve_app.trace_exporters:otlp"}
    parsed = to_schema(config | {"tracing_config": tracing | {"sampling_ratio": 0.1}})
    assert parsed.tracing_config is not None
    assert parsed.tracing_config.sampling_ratio == 0.1
    for wrong, reason in (
        ({"ratio": 1}, r"unknown key tracing_config.ratio; "),
        ({"sampling_ratio": 2}, r"must be between 0.0 and 1.0, got 2"),
        ({"exporter_import_path": "serve_app.trace_exporters:otpl"}, "otpl"),
        ({"exporter_import_path": "nowhere"}, "tracing_config.exporter_import_path: "),
    ):
        with pytest.raises(ConfigError, match=reason):
            to_schema(config | {"tracing_config": tracing | wrong})


def test_otlp_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"manta-serve\[otlp\]"):
        trace_exporters.otlp()


def test_otlp_reaches_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    paths: list[str] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            assert b"chat tiny" in self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        provider = TracerProvider()
        for processor in trace_exporters.otlp():
            provider.add_span_processor(processor)
        provider.get_tracer("manta").start_span("chat tiny").end()
        provider.shutdown()
        server.shutdown()
    assert paths == ["/v1/traces"]


@pytest.mark.ray
@pytest.mark.slow
def test_manta_serve_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through HAProxy: the client's traceparent, Serve's span, ours."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["args"]["engine"] = {"model": str(DEMO), "device": "cpu"}
    config["tracing_config"] = {
        "enabled": True,
        "sampling_ratio": 0.0,  # the client decides
        "exporter_import_path": "tests.span_lines:exporter",
    }
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    lines = tmp_path / "spans"
    monkeypatch.setenv("MANTA_SPANS", str(lines))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    trace_id, client_span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with running(BIN / "manta", "serve", "--port", "0", cwd=tmp_path) as server:
        url = server.await_ready()
        body = chat(stream=True) | {"model": "demo"}
        chats, traceparent = f"{url}/v1/chat/completions", f"00-{trace_id}-{client_span}-01"
        assert httpx.post(chats, json=body, timeout=60).status_code == 200
        deadline = time.monotonic() + 60
        # Until HAProxy knows the replica, requests take the way of Serve's fallback proxy, which
        # does not pass on that the client wants a trace.
        while not {"replica_handle_request", "chat"} <= (found := _by_name(lines)).keys():
            assert time.monotonic() < deadline, found
            headers = {"traceparent": traceparent}
            assert httpx.post(chats, json=body, headers=headers, timeout=60).status_code == 200
            time.sleep(0.2)
    assert {span["context"]["trace_id"] for span in found.values()} == {f"0x{trace_id}"}
    assert found["replica_handle_request"]["parent_id"] == f"0x{client_span}"
    serves = found["replica_handle_request"]["context"]["span_id"]
    assert found["chat"]["parent_id"] == serves
    assert found["chat"]["attributes"]["gen_ai.usage.output_tokens"] > 0


def _by_name(lines: Path) -> dict[str, dict[str, Any]]:
    """Spans by the first word of their names."""
    text = lines.read_text() if lines.exists() else ""
    spans = [json.loads(line) for line in text.splitlines()]
    return {span["name"].split()[0]: span for span in spans}
