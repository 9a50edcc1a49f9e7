"""Streams that are cut and go on behind the last event their client has: nothing missing, nothing
twice, wherever the cut is. The engine is scripted and reports in pieces of random sizes."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.outputs import SequenceOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from serve_app.event_ids import EventIds, Position
from tests.stub_engine import StubGroup, chat, client_of, served
from tests.test_streams import run

LENGTH = 16


def tokens_of(request: EngineRequest) -> list[int]:
    """What the scripted engine draws: a function of the seed."""
    rng = random.Random(request.seed)
    return [rng.choice([32, *range(97, 123)]) for _ in range(LENGTH)]


async def play(group: StubGroup, request: EngineRequest, rng: random.Random) -> None:
    """Report all tokens of a sequence, several at a time."""
    token_ids = tokens_of(request)[: request.params.max_tokens]
    while token_ids:
        size = rng.randint(1, 4)
        part, token_ids = token_ids[:size], token_ids[size:]
        output = SequenceOutput(request.request_id, part)
        if request.params.logprobs is not None:
            output.logprobs = [TokenLogprobs(i, -1.0, 1, [], []) for i in part]
        if not token_ids:
            output.finish_reason = "length"
        group.put(output)
        if rng.random() < 0.7:  # else the next piece joins this one
            await asyncio.sleep(0.001)


class Server:
    """The application in front of a scripted engine."""

    def __init__(self, group: StubGroup, client: httpx.AsyncClient, seed: int) -> None:
        self._group, self._client, self._rng = group, client, random.Random(seed)
        self._num_requests = 0

    async def ask(self, path: str, body: dict[str, Any], last: str | None) -> httpx.Response:
        headers = {} if last is None else {"Last-Event-ID": last}
        asking = asyncio.ensure_future(self._client.post(path, json=body, headers=headers))
        sequences = body.get("n", 1) * (len(body["prompt"]) if "prompt" in body else 1)
        self._num_requests += sequences
        request_ids = await self._group.wait_for(self._num_requests)
        requests = [self._group.requests[each] for each in request_ids[-sequences:]]
        await asyncio.gather(*(play(self._group, request, self._rng) for request in requests))
        return await asking


def blocks(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    *events, end = response.text.split("\n\n")
    assert (events[-1], end) == ("data: [DONE]", "")
    return events


def parse(block: str) -> tuple[str | None, Any]:
    """An event's id, and its data without what differs between two streams."""
    lines = dict(line.split(": ", 1) for line in block.split("\n"))
    if lines["data"] == "[DONE]":
        return lines.get("id"), "[DONE]"
    data = json.loads(lines["data"])
    del data["id"], data["created"]
    return lines.get("id"), data


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """Per choice: its roles, text, token ids, ends, and the usage in the end."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        if event == "[DONE]":
            continue
        if event.get("usage"):
            found[-1] = event["usage"]
        for part in event["choices"]:
            choice = found.setdefault(part["index"], {"text": "", "roles": 0, "ids": [], "end": []})
            delta = part.get("delta", {})
            choice["roles"] += "role" in delta
            choice["text"] += part.get("text") or delta.get("content") or ""
            choice["ids"] += part.get("token_ids") or []
            choice["end"] += [part["finish_reason"]] if part["finish_reason"] else []
            choice.setdefault("logprobs", []).append(part["logprobs"])
            offsets = (part["logprobs"] or {}).get("text_offset", [])
            choice.setdefault("offsets", []).extend(offsets)
            del choice["logprobs"]
    return found


USAGE = {"include_usage": True}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", chat(stream=True, seed=4)),
    ("/v1/chat/completions", chat(stream=True, n=3, return_token_ids=True)),
    ("/v1/chat/completions", chat(stream=True, stop=["e "], stream_options=USAGE)),
    ("/v1/completions", {"model": "tiny", "stream": True, "prompt": ["ab", "c"], "n": 2, "seed": -3}
     | {"echo": True, "logprobs": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), KINDS)
def test_whatever_event_a_client_has_it_gets_the_rest(
    tiny_checkpoint: Path, path: str, body: dict[str, Any]
) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            server = Server(group, client, seed=1)
            whole = [parse(block) for block in blocks(await server.ask(path, body, "0"))]
            expected = joined([data for _, data in whole])
            assert any(event_id for event_id, _ in whole)
            for cut, (event_id, _) in enumerate(whole, start=1):
                if event_id is None:
                    continue
                rest = [parse(block) for block in blocks(await server.ask(path, body, event_id))]
                assert joined([data for _, data in whole[:cut] + rest]) == expected
                last_id = [event_id for event_id, _ in whole + rest if event_id][-1]
                assert last_id == [event_id for event_id, _ in whole if event_id][-1]

    run(test())


def test_a_stream_resumed_many_times_is_whole(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            server = Server(group, client, seed=2)
            body = chat(stream=True, n=2, return_token_ids=True)
            events: list[Any] = []
            last = "0"
            while "[DONE]" not in events:
                for block in blocks(await server.ask("/v1/chat/completions", body, last))[:2]:
                    event_id, data = parse(block)
                    last = event_id or last
                    events.append(data)
            seed = int(last.split(".")[0], 16)
            for index, choice in joined(events).items():
                request = EngineRequest(
                    request_id="", prompt_token_ids=[], params=SamplingParams(), seed=seed + index
                )
                assert choice["ids"] == tokens_of(request)
                assert (choice["roles"], choice["end"]) == (1, ["length"])

    run(test())


def test_streams_have_no_ids_unless_they_are_asked_for(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            server = Server(group, client, seed=3)
            response = await server.ask("/v1/chat/completions", chat(stream=True), None)
            assert all(parse(block)[0] is None for block in blocks(response))

    run(test())


def test_what_came_out_different_is_refused(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            server = Server(group, client, seed=4)
            body = chat(stream=True)
            events = [
                parse(block)
                for block in blocks(await server.ask("/v1/chat/completions", body, "0"))
            ]
            had = events[3][0]
            assert had is not None
            wrong = [had[:-8] + "00000000", had.replace(".", ".999"), had + "x"]
            for last in wrong:
                response = await server.ask("/v1/chat/completions", body, last)
                assert response.status_code == 409, last
                assert response.json()["error"]["code"] == "cannot_resume"
            shorter = body | {"max_tokens": 1}
            response = await server.ask("/v1/chat/completions", shorter, had)
            assert response.status_code == 409

    run(test())


@pytest.mark.parametrize(
    ("last", "fields", "message"),
    [
        ("", {}, "must be the id of an event or '0', got ''"),
        ("7.x", {}, "must be the id of an event"),
        ("7.1-00000000", {"n": 2}, "a stream of 1 choices, the request has 2"),
        ("7.1-00000000", {"seed": 8}, "a stream with seed 7, the request has 8"),
        ("7.1-00000000", {"stream": False}, "needs stream=true"),
    ],
)
def test_an_id_that_does_not_fit_the_request_is_refused(
    tiny_checkpoint: Path, last: str, fields: dict[str, Any], message: str
) -> None:
    async def test() -> None:
        async with served(tiny_checkpoint) as (_, app), client_of(app) as client:
            body = chat(stream=True) | fields
            headers = {"Last-Event-ID": last}
            response = await client.post("/v1/chat/completions", json=body, headers=headers)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "Last-Event-ID"
            assert message in response.json()["error"]["message"]

    run(test())


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63)])
def test_an_id_reads_back(seed: int) -> None:
    ids = EventIds(seed, 3, [Position(1, 2, True), Position(), Position(10**6, 2**32 - 1)])
    text = ".".join([f"{seed % 2**64:x}", *map(str, ids._had)])
    again = EventIds.parse(text, num_choices=3, seed=None, new_seed=1)
    assert (again.seed, again._had, again.resumes) == (seed, ids._had, True)
