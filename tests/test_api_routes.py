"""What the running application reports, counts and refuses, by the openai client."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.api_client import HELLO, reference
from tests.conftest import MODEL_NAME, SESSION_LEN

pytestmark = pytest.mark.ray


# -- caching and limits ----------------------------------------------------------------------


def test_cached_tokens_are_reported_and_a_salt_separates_them(http: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "cache me " * 12, "max_tokens": 1}

    def cached(**fields: Any) -> int:
        usage = http.post("/v1/completions", json=body | fields).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() >= 16
    assert cached(cache_salt="other") == 0
    assert cached(cache_salt="other") >= 16


def test_a_prompt_is_truncated_to_its_end(http: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "abcdefgh", "max_tokens": 1, "echo": True}
    answer = http.post("/v1/completions", json={**body, "truncate_prompt_tokens": 3}).json()
    assert answer["choices"][0]["text"].startswith("fgh")
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": "a" * 3000}, "prompt", f"holds {SESSION_LEN} tokens; the prompt has 3000"),
        ({"prompt": "a", "max_tokens": SESSION_LEN}, "prompt", "513 together"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": [300]}, "prompt", "token id 300; this model has ids 0 to 299"),
        ({"prompt": [2**40]}, "prompt", f"token id {2**40}; this model has ids 0 to 299"),
        ({"prompt": "a", "n": 129}, "n", "between 1 and 128, got 129"),
        ({"prompt": ["a", "b"], "n": 100}, "prompt", "200 sequences; one request may have 128"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported by this server"),
        ({"prompt": "a", "temperature": 101}, "temperature", "got 101"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_name_the_field_and_the_limit(
    client: OpenAI, fields: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
        client.completions.create(model=MODEL_NAME, stream=stream, **fields)
    assert caught.value.param == param


def test_too_long_a_context_has_openais_code(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL_NAME, messages=[{"role": "user", "content": "word " * 600}]
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


def test_other_models_are_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "not valid JSON"),
        ("POST", "/v1/chat/completions", b"x" * (1024 * 1024 + 1), 413, "1048576 bytes"),
        ("GET", "/v1/completions", b"", 405, "use POST"),
        ("GET", "/v2/completions", b"", 404, "routes are listed at /docs"),
    ],
)
def test_requests_that_are_not_requests(
    http: httpx.Client, method: str, path: str, content: bytes, status: int, message: str
) -> None:
    response = http.request(method, path, content=content)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


# -- other routes ----------------------------------------------------------------------------


def test_the_served_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME


@pytest.mark.parametrize("text", ["The quick brown fox", "Größe 你好 🙂", "<|im_start|>user\n"])
def test_tokenise_and_back(http: httpx.Client, tiny_checkpoint: Path, text: str) -> None:
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    _, tokenizer = reference(tiny_checkpoint)
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == SESSION_LEN
    back = http.post("/detokenize", json={"model": MODEL_NAME, "tokens": answer["tokens"]})
    assert back.json() == {"prompt": text}


def test_a_chat_is_tokenised_as_it_is_prompted(http: httpx.Client, tiny_checkpoint: Path) -> None:
    _, tokenizer = reference(tiny_checkpoint)
    expected = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    answer = http.post("/tokenize", json={"model": MODEL_NAME, "messages": HELLO}).json()
    assert answer["tokens"] == expected
    assert http.post("/detokenize", json={"tokens": [300]}).status_code == 400
    assert http.post("/tokenize", json={"model": "x", "prompt": "a"}).status_code == 404


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.head("/health").status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+", http.get("/version").json()["version"])


def test_the_docs_need_no_other_host(http: httpx.Client) -> None:
    page = http.get("/docs").text
    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert assets
    for asset in assets:
        assert asset.startswith("/")
        assert http.get(asset).status_code == 200
    assert "://" not in page
    schema = http.get("/openapi.json").json()
    fields = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert fields["top_k"]["description"]
    for reference_ in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)):
        assert reference_ in schema["components"]["schemas"]
