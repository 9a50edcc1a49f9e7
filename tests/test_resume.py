"""Cut streams that go on, on the running application: real draws, real sums, the openai client."""

import json
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.conftest import MODEL_NAME

pytestmark = pytest.mark.ray

BODY: dict[str, Any] = {"model": MODEL_NAME, "prompt": "The quick", "stream": True, "n": 2}
BODY |= {"max_tokens": 40, "ignore_eos": True, "temperature": 1, "top_k": 8, "seed": 5}
BODY |= {"return_token_ids": True, "stream_options": {"include_usage": True}}


def read(http: httpx.Client, last: str, num_events: int | None) -> tuple[list[Any], str]:
    """The stream behind an event, cut after some events, and the last id."""
    events: list[Any] = []
    headers = {"Last-Event-ID": last}
    with http.stream("POST", "/v1/completions", json=BODY, headers=headers) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                last = value
            elif name == "data" and value != "[DONE]":
                events.append(json.loads(value))
            if value == "[DONE]" or len(events) == num_events:
                break
    return events, last


def joined(events: list[Any]) -> Any:
    choices: dict[int, list[Any]] = {}
    for part in (part for event in events for part in event["choices"]):
        whole = choices.setdefault(part["index"], ["", [], None])
        whole[0] += part["text"]
        whole[1] += part["token_ids"]
        whole[2] = part["finish_reason"]
    return choices, events[-1]["usage"]["completion_tokens"]


def test_a_stream_cut_twice_is_the_whole_stream(http: httpx.Client) -> None:
    whole, _ = read(http, "0", None)
    first, last = read(http, "0", 9)
    second, last = read(http, last, 5)
    third, _ = read(http, last, None)
    assert joined(first + second + third) == joined(whole)


def test_the_openai_client_reads_streams_with_ids(client: OpenAI) -> None:
    def text(**options: Any) -> str:
        stream = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=9,
            temperature=0,
            stream=True,
            **options,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert text(extra_headers={"Last-Event-ID": "0"}) == text() != ""
