"""What happens around a generation when the engine or the client fails; the engine is a stub."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from engine.errors import EngineDeadError, InvalidRequestError, QueueFullError
from engine.outputs import SequenceOutput
from tests.stub_engine import StubGroup, chat, client_of, served

STOPPED = "the engine stopped and is being restarted; try again in 5 s"


def run(test: Any) -> None:
    """Run a coroutine with a bound, so that a request that never ends fails its test."""
    asyncio.run(asyncio.wait_for(test, 30))


class Connection:
    """One HTTP request at the ASGI level: what was sent so far, and a client that may be slow."""

    def __init__(self, app: FastAPI, body: dict[str, Any], path: str = "/v1/chat/completions"):
        self.status: int | None = None
        self.chunks: list[bytes] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        self._body = json.dumps(body).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [],
            "query_string": b"",
            "root_path": "",
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    @property
    def text(self) -> str:
        return b"".join(self.chunks).decode()

    def events(self) -> list[dict[str, Any]]:
        """The JSON of each event but [DONE]."""
        lines = [line for line in self.text.split("\n\n") if line and line != "data: [DONE]"]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    async def wait_for(self, text: str) -> None:
        while text not in self.text:
            await asyncio.sleep(0.001)

    async def _receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Any) -> None:
        await self.may_send.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.chunks.append(message["body"])


def test_outputs_that_wait_for_a_slow_client_become_one_chunk(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app):
            connection = Connection(app, chat(stream=True))
            (request_id,) = await group.wait_for(1)
            group.put(SequenceOutput(request_id, [42]))
            await connection.wait_for("content")
            connection.may_send.clear()
            for token_id in (43, 44, 45, 46):
                group.put(SequenceOutput(request_id, [token_id]))
                await asyncio.sleep(0.01)
            connection.may_send.set()
            group.put(SequenceOutput(request_id, [47], finish_reason="length"))
            await connection.task
            texts = [event["choices"][0]["delta"].get("content") for event in connection.events()]
            assert len(texts) <= 5  # role, first token, the one in flight, the rest
            assert connection.text.endswith("data: [DONE]\n\n")

    run(test())


def test_a_refusal_by_the_engine_has_its_own_status_also_for_streams(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            for number, stream in enumerate((False, True), start=1):
                request = asyncio.ensure_future(
                    client.post("/v1/chat/completions", json=chat(stream=stream))
                )
                request_id = (await group.wait_for(number))[-1]
                error = QueueFullError("200 requests are waiting", retry_after=3)
                group.put(SequenceOutput(request_id, finish_reason="error", error=error))
                response = await request
                assert response.status_code == 429
                assert response.headers["retry-after"] == "3"
                assert response.json()["error"]["code"] == "queue_full"

    run(test())


def test_an_engine_error_names_its_field(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            request = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat()))
            (request_id,) = await group.wait_for(1)
            error = InvalidRequestError("seed is odd", "seed")
            group.put(SequenceOutput(request_id, finish_reason="error", error=error))
            response = await request
            assert response.status_code == 400
            assert response.json()["error"] == {
                "message": "seed is odd",
                "type": "invalid_request_error",
                "param": "seed",
                "code": None,
            }

    run(test())


@pytest.mark.parametrize("failure", [EngineDeadError("rank 1 died"), RuntimeError("rank 1 died")])
def test_a_dead_engine_ends_every_request_and_the_replicas_health(
    tiny_checkpoint: Path, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            streaming = Connection(app, chat(stream=True))
            waiting = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat()))
            request_ids = await group.wait_for(2)
            assert (await client.get("/health")).status_code == 200
            group.put(SequenceOutput(request_ids[0], [42]))
            await streaming.wait_for("content")
            group.die(failure)

            answer = await waiting
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            await streaming.task
            assert streaming.status == 200
            assert streaming.events()[-1]["error"]["message"] == STOPPED
            assert "[DONE]" not in streaming.text

            for response in (
                await client.post("/v1/chat/completions", json=chat(stream=True)),
                await client.get("/health"),
            ):
                assert response.status_code == 503
                assert response.json()["error"]["message"] == STOPPED

    run(test())
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "rank 1 died" in record.getMessage()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_cancelled_request_is_aborted(
    tiny_checkpoint: Path, stream: bool, num_tokens: int
) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app):
            connection = Connection(app, chat(stream=stream, n=2))
            request_ids = await group.wait_for(2)
            if num_tokens:
                group.put(SequenceOutput(request_ids[0], [42]))
                await asyncio.sleep(0.05)
            connection.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connection.task
            await asyncio.sleep(0.01)
            assert sorted(group.aborted) == sorted(request_ids)
            assert app.state.models.own.engine.num_open == 0
            group.put(SequenceOutput(request_ids[0], [43]))  # too late, and for nobody
            await asyncio.sleep(0.01)

    run(test())


def test_a_request_cancelled_before_it_is_submitted_never_is(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app):
            engine = app.state.models.own.engine
            generations = [Connection(app, chat(stream=True)) for _ in range(3)]
            while engine.num_open < 3:
                await asyncio.sleep(0)
            for connection in generations:
                connection.task.cancel()
            await asyncio.gather(*(c.task for c in generations), return_exceptions=True)
            await asyncio.sleep(0.01)
            assert engine.num_open == 0
            assert set(group.requests) <= set(group.aborted)

    run(test())


def test_requests_of_one_tick_are_submitted_together(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app):
            connections = [Connection(app, chat(n=2, seed=5)) for _ in range(4)]
            request_ids = await group.wait_for(8)
            assert len(group.calls) == 1
            assert [group.requests[i].seed for i in request_ids] == [5, 6] * 4
            for request_id in request_ids:
                group.put(SequenceOutput(request_id, [42], finish_reason="stop"))
            await asyncio.gather(*(connection.task for connection in connections))

    run(test())


def test_a_stop_string_aborts_and_what_came_after_it_does_not_count(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            body = chat(stop=["b"], return_token_ids=True)
            request = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
            (request_id,) = await group.wait_for(1)
            token_ids = app.state.models.own.tokenizer.encode("aabaaa")
            assert len(token_ids) == 6
            group.put(SequenceOutput(request_id, token_ids))
            answer = (await request).json()
            choice = answer["choices"][0]
            assert (choice["message"]["content"], choice["stop_reason"]) == ("aa", "b")
            assert choice["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == 3
            assert choice["token_ids"] == token_ids[:3]
            await asyncio.sleep(0.01)
            assert group.aborted == [request_id]

    run(test())


def test_shutting_down_ends_open_requests(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app):
            streaming = Connection(app, chat(stream=True))
            (request_id,) = await group.wait_for(1)
            waiting = Connection(app, chat())
            await group.wait_for(2)
            group.put(SequenceOutput(request_id, [42]))
            await streaming.wait_for("content")
        await asyncio.gather(streaming.task, waiting.task)
        assert waiting.status == 503
        assert streaming.events()[-1]["error"]["code"] == "shutting_down"
        assert "[DONE]" not in streaming.text
        assert group.stopped

    run(test())


def test_an_unforeseen_error_is_a_500_in_the_same_shape(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (_, app), client_of(app) as client:
            monkeypatch.setattr("serve_app.models.Models.card", lambda *names: 1 / 0)
            response = await client.get("/v1/models")
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"

    run(test())


def test_an_access_line_counts_and_never_quotes(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            body = chat(user="ada", messages=[{"role": "user", "content": "secret"}])
            request = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
            (request_id,) = await group.wait_for(1)
            group.put(SequenceOutput(request_id, [42, 43], finish_reason="length"))
            await request

    caplog.set_level("INFO", logger="ray.serve")
    run(test())
    assert "completion=2 length user='ada'" in caplog.text
    assert "secret" not in caplog.text


def test_building_the_application_loads_neither_torch_nor_transformers() -> None:
    """Serve does it in a process of its own, which would take 4 s longer."""
    code = "import sys, serve_app.app; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_stub_group_has_the_engine_groups_methods() -> None:
    from engine.ray_group import EngineGroup

    for name in ("submit", "abort", "poll", "check", "stop"):
        assert callable(getattr(StubGroup, name))
        assert callable(getattr(EngineGroup, name))
