"""What one request may cost: bodies, texts, sequences. The engine is a stub: none gets that far."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.errors import InvalidRequestError
from engine.tokenizer import Tokenizer
from serve_app.api.body import INLINE_BYTES
from serve_app.errors import ApiError
from serve_app.model_spec import Limits
from serve_app.models import Models
from serve_app.protocol.chat import ChatCompletionRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.parse import parse
from serve_app.protocol.strict import Strict
from serve_app.protocol.tokenize import DetokenizeRequest
from tests.bodies import CHAT, COMPLETION, parse_chat, refusal, served_model
from tests.stub_engine import CONFIG, INFO, StubGroup, app_of, chat, client_of, make_model, served

MANY = 5000
KEYS = {f"key{i}": 1 for i in range(MANY)}
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatCompletionRequest, CHAT | KEYS),
        (ChatCompletionRequest, CHAT | {"messages": [USER | KEYS]}),
        (ChatCompletionRequest, CHAT | {"messages": [1] * MANY}),
        (ChatCompletionRequest, CHAT | {"messages": [USER] * MANY + [1]}),
        (ChatCompletionRequest, CHAT | {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatCompletionRequest, CHAT | {"messages": [USER | {"tool_calls": [1] * MANY}]}),
        (ChatCompletionRequest, CHAT | {"stream_options": KEYS}),
        (ChatCompletionRequest, CHAT | {"logit_bias": KEYS}),
        (ChatCompletionRequest, CHAT | {"stop": [1] * MANY}),
        (ChatCompletionRequest, CHAT | {"bad_words": [1] * MANY}),
        (ChatCompletionRequest, CHAT | {"allowed_token_ids": [""] * MANY}),
        (CompletionRequest, COMPLETION | {"prompt": [[]] * MANY}),
        (CompletionRequest, COMPLETION | {"prompt": [[], "a"] * MANY}),
        (CompletionRequest, COMPLETION | {"prompt": ["", 1] * MANY}),
        (CompletionRequest, COMPLETION | {"prompt": [1, ""] * MANY}),
        (DetokenizeRequest, {"tokens": [1]} | KEYS),
        (DetokenizeRequest, {"tokens": [""] * MANY}),
    ],
)
def test_many_mistakes_are_few_errors(model: type[Strict], body: dict[str, Any]) -> None:
    """An error for each took 7 s of all streams' time for a body of 400 KB."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 3  # one per type the field may have


@pytest.mark.parametrize(
    "fields",
    [
        {"x" * 10_000: 1},
        {"stream_options": {"x" * 10_000: 1}},
        {"logit_bias": {"x" * 10_000: 1}},
        {"temperature": "x" * 10_000},
        {"temperature": [[]] * 10_000},
        {"model": "x" * 10_000},
        {"user": "x" * 10_000},
        {"cache_salt": "x" * 10_000},
        {"messages": [{"role": "user", "content": [{"type": "x" * 10_000}]}]},
    ],
)
def test_an_error_does_not_repeat_a_long_value(fields: dict[str, Any]) -> None:
    assert len(refusal(parse_chat, **fields).to_json()) < 500


@pytest.mark.parametrize("digits", [100, 4000, 100_000])
def test_a_number_of_any_length_is_refused(digits: int) -> None:
    body = json.dumps(CHAT)[:-1].encode() + b', "seed": %s}' % (b"9" * digits)
    with pytest.raises((ApiError, InvalidRequestError)):
        parse(ChatCompletionRequest, body).sampling_params(
            served_model(), max_tokens=None, logprobs=None
        )


def test_lists_of_token_ids_are_no_longer_than_the_vocabulary() -> None:
    for field in ("stop_token_ids", "allowed_token_ids"):
        request = parse_chat(**{field: [1] * 301})
        error = refusal(request.sampling_params, served_model(), max_tokens=None, logprobs=None)
        assert error.param == field
        assert "301 token ids; this model has 300 tokens" in str(error)


async def answer(checkpoint: Path, path: str, **body: Any) -> dict[str, Any]:
    """The error a request gets before the engine hears of it."""
    async with served(checkpoint) as (group, app), client_of(app) as client:
        response = await asyncio.wait_for(client.post(path, json=body), 30)
        assert response.status_code == 400, response.text
        assert not group.calls
        error: dict[str, Any] = response.json()["error"]
        return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a" * 1665}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "a" * 1665]}, "prompt"),
        ("/v1/chat/completions", {"messages": [USER, {**USER, "content": "a" * 1663}]}, "messages"),
    ],
)
def test_a_text_beyond_any_context_is_never_tokenised(
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    param: str,
) -> None:
    assert Tokenizer.load(tiny_checkpoint).longest_token == len("<|endoftext|>") == 1664 // 128
    monkeypatch.setattr(Tokenizer, "encode", lambda *args: 1 / 0)
    error = asyncio.run(answer(tiny_checkpoint, path, model="tiny", **body))
    assert error["param"] == param
    assert error["code"] == "context_length_exceeded"
    assert "128 tokens, which are at most 1664 characters" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "a", "n": 7}, "n", "one request may have 6 (max_waiting_requests)"),
        ({"prompt": ["a"] * 7}, "prompt", "one request may have 6 (max_waiting_requests)"),
        ({"prompt": "a" * 34, "n": 3}, "n", "102 prompt tokens together; one request may have 100"),
        ({"prompt": ["a" * 51] * 2}, "prompt", "102 prompt tokens together"),
    ],
)
def test_what_can_never_wait_at_once_is_not_told_to_try_again(
    tiny_checkpoint: Path, body: dict[str, Any], param: str, message: str
) -> None:
    assert (CONFIG.max_waiting_requests, CONFIG.max_waiting_tokens) == (6, 100)
    error = asyncio.run(answer(tiny_checkpoint, "/v1/completions", model="tiny", **body))
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(tiny_checkpoint: Path, chunked: bool) -> None:
    body = json.dumps(chat(user="x" * 20_000)).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async def test() -> None:
        async with served(tiny_checkpoint) as (_, app), client_of(app) as client:
            content: Any = pieces() if chunked else body
            response = await client.post("/v1/chat/completions", content=content)
            assert response.status_code == 413
            message = response.json()["error"]["message"]
            assert message == "the body may have 10000 bytes (max_body_bytes)"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("configured", "session_len", "allowed"),
    [(None, 1024, 2**20), (None, 2**17, 2**21), (5000, 2**17, 5000)],
)
def test_a_body_may_hold_what_the_context_can_need(
    tiny_checkpoint: Path, configured: int | None, session_len: int, allowed: int
) -> None:
    async def test() -> None:
        group = StubGroup()
        group.info = replace(INFO, session_len=session_len)
        model = make_model(group, tiny_checkpoint)
        limits = replace(model.limits, max_body_bytes=configured)
        spec = replace(model.spec, limits=limits)
        assert replace(model, spec=spec).max_body_bytes == allowed
        model.engine.stop()

    asyncio.run(test())


def test_a_large_body_is_read_as_a_small_one(tiny_checkpoint: Path) -> None:
    """Large ones are parsed in a thread."""

    async def test() -> None:
        group = StubGroup()
        model = make_model(group, tiny_checkpoint)
        models = Models(replace(model, spec=replace(model.spec, limits=Limits(None, 8))))
        app = app_of(models)
        async with client_of(app) as client:
            for padding in (0, INLINE_BYTES):
                content = json.dumps({"tokens": [65]}).encode() + b" " * padding
                response = await client.post("/detokenize", content=content)
                assert response.json() == {"prompt": model.tokenizer.decode([65])}
        model.engine.stop()

    asyncio.run(test())
