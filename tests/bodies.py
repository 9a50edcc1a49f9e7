"""Parsing request bodies in tests: the least a request needs, and what refuses it."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.tokenizer import Tokenizer
from serve_app.errors import ApiError
from serve_app.protocol.chat import ChatCompletionRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.parse import parse
from serve_app.served_model import ServedModel
from tests.tiny_tokenizers import write_byte_level

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "tiny", "prompt": "Hi"}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(write_byte_level(Path(mkdtemp())))


def served_model(**defaults: float) -> ServedModel:
    """As much of a ServedModel as sampling parameters are made from."""
    stub = SimpleNamespace(
        tokenizer=SimpleNamespace(sampling_defaults=defaults, encode=tokenizer().encode),
        info=SimpleNamespace(vocab_size=300),
    )
    return cast(ServedModel, stub)


def parse_chat(**fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps(CHAT | fields).encode())


def parse_completion(**fields: Any) -> CompletionRequest:
    body = json.dumps(COMPLETION | fields).encode()
    return parse(CompletionRequest, body)


def refusal(function: Any, *args: Any, **kwargs: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        function(*args, **kwargs)
    return caught.value
