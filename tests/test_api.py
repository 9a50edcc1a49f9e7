"""The running application, asked by the official openai client; transformers is the oracle."""

import asyncio
import copy
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from tests.conftest import MODEL_NAME, SESSION_LEN

pytestmark = pytest.mark.ray

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "The quick brown fox"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


@cache
def reference(path: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def continue_greedily(path: Path, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """What transformers generates, without an end of text."""
    model, _ = reference(path)
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(map(int, output[0, len(prompt_ids) :]))


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of each event of a finished stream."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# -- chats ----------------------------------------------------------------------------------


def test_a_chat_is_what_transformers_answers(client: OpenAI, tiny_checkpoint: Path) -> None:
    _, tokenizer = reference(tiny_checkpoint)
    prompt_ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, max_tokens=24, **GREEDY
    )
    expected = continue_greedily(tiny_checkpoint, prompt_ids, 24)
    choice = answer.choices[0]
    assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.model == MODEL_NAME
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (24, 24 + len(prompt_ids))


def test_a_streamed_chat_is_the_whole_one(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, max_tokens=30, **GREEDY
    )
    chunks = list(
        client.chat.completions.create(
            model=MODEL_NAME,
            messages=HELLO,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == [
        "length"
    ]
    assert not last.choices
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_chunks_are_valid_by_the_clients_own_types(http: httpx.Client) -> None:
    body = {
        "model": MODEL_NAME,
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 8,
        "return_token_ids": True,
    }
    chunks = events(http.post("/v1/chat/completions", json=body))
    counted = 0
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk["usage"]["completion_tokens"] >= counted
        counted = chunk["usage"]["completion_tokens"]
    assert counted == 16
    for index in (0, 1):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        entries = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
        token_ids = [token_id for c in choices for token_id in c.get("token_ids", [])]
        assert len(entries) == len(token_ids) == 8
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_log_probabilities_are_the_models(client: OpenAI, tiny_checkpoint: Path) -> None:
    model, tokenizer = reference(tiny_checkpoint)
    prompt_ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, max_tokens=6, logprobs=True, top_logprobs=3, **GREEDY
    )
    token_ids = continue_greedily(tiny_checkpoint, prompt_ids, 6)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for row, token_id, entry in zip(expected, token_ids, logprobs.content, strict=True):
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        top = [alternative.logprob for alternative in entry.top_logprobs]
        assert top == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        assert entry.top_logprobs[0].token == entry.token  # greedy
    joined = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert joined.decode(errors="replace") == tokenizer.decode(token_ids)


def test_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL_NAME, messages=HELLO, n=3, seed=11, max_tokens=12, temperature=1.5
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    texts = ask()
    assert len(set(texts)) == 3
    assert ask() == texts


def test_a_final_message_is_continued(http: httpx.Client, tiny_checkpoint: Path) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "jumps over"}]
    body = {"messages": messages, "continue_final_message": True}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    _, tokenizer = reference(tiny_checkpoint)
    assert tokenizer.decode(tokens).endswith("<|im_start|>assistant\njumps over")
    answer = http.post(
        "/v1/chat/completions",
        json={**body, "model": MODEL_NAME, "max_tokens": 5, "temperature": 0, "ignore_eos": True},
    ).json()
    expected = tokenizer.decode(continue_greedily(tiny_checkpoint, tokens, 5))
    assert answer["choices"][0]["message"]["content"] == expected


# -- completions ----------------------------------------------------------------------------


def test_prompts_of_every_shape_give_one_answer(client: OpenAI, tiny_checkpoint: Path) -> None:
    _, tokenizer = reference(tiny_checkpoint)
    texts = ["The quick brown fox", "What is 12 + 30?"]
    token_ids = [tokenizer.encode(text) for text in texts]
    expected = [tokenizer.decode(continue_greedily(tiny_checkpoint, ids, 8)) for ids in token_ids]

    def complete(prompt: Any) -> list[str]:
        answer = client.completions.create(model=MODEL_NAME, prompt=prompt, max_tokens=8, **GREEDY)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8 * len(answer.choices)
        return [choice.text for choice in answer.choices]

    assert complete(texts) == complete(token_ids) == expected
    assert complete(texts[0]) == complete(token_ids[0]) == expected[:1]


def test_prompts_times_n_are_numbered_by_prompt(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL_NAME, prompt=["aaa", "bbb"], n=2, max_tokens=1, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["aaa", "aaa", "bbb", "bbb"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(http: httpx.Client, tiny_checkpoint: Path, stream: bool) -> None:
    model, tokenizer = reference(tiny_checkpoint)
    prompt = "What is 12 + 30?"
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    response = http.post("/v1/completions", json=body)
    chunks = events(response) if stream else [response.json()]
    for chunk in chunks:
        checked = copy.deepcopy(chunk["choices"][0])  # where OpenAI's own server sends null too
        checked["finish_reason"] = checked["finish_reason"] or "stop"
        checked["logprobs"]["token_logprobs"][:1] = [0.0]
        checked["logprobs"]["top_logprobs"][:1] = [{}]
        Completion.model_validate({**chunk, "choices": [checked]}, strict=True)
    lists = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    names = [name for part in lists for name in part["tokens"]]
    scores = [score for part in lists for score in part["token_logprobs"]]
    offsets = [offset for part in lists for offset in part["text_offset"]]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    prompt_ids = tokenizer.encode(prompt)
    token_ids = prompt_ids + continue_greedily(tiny_checkpoint, prompt_ids, 4)
    assert text == tokenizer.decode(token_ids)
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    assert scores[0] is None
    want = expected.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()
    assert scores[1:] == pytest.approx(want, abs=1e-3)
    for name, offset in zip(names, offsets, strict=True):
        assert name.startswith("bytes:") or text[offset:].startswith(name)


def test_prompt_logprobs_come_in_vllms_shape(http: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "abc", "max_tokens": 1, "prompt_logprobs": 2}
    first, *others = http.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    assert first is None
    for entry in others:
        assert 2 <= len(entry) <= 3
        assert {"logprob", "rank", "decoded_token"} == set(next(iter(entry.values())))


# -- where a text ends ----------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_may_lie_across_tokens(client: OpenAI, include: bool) -> None:
    def complete(**fields: Any) -> Any:
        body = {"ignore_eos": True, "include_stop_str_in_output": include}
        answer = client.completions.create(
            model=MODEL_NAME, prompt="a", max_tokens=60, seed=5, extra_body=body, **fields
        )
        return answer.choices[0]

    full = complete().text
    stop = re.sub("\ufffd.*", "", full[8:], flags=re.DOTALL)[:4] or full[8:12]
    choice = complete(stop=[stop, "never there"])
    end = full.index(stop) + (len(stop) if include else 0)
    assert choice.text == full[:end]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop


def test_stop_token_ids_and_min_tokens(http: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "a", "temperature": 0, "max_tokens": 20}
    body |= {"return_token_ids": True, "ignore_eos": True}
    token_ids = http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
    stop = token_ids[3]
    body["stop_token_ids"] = [stop]
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["token_ids"] == token_ids[: token_ids.index(stop) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    choice = http.post("/v1/completions", json={**body, "min_tokens": 10}).json()["choices"][0]
    assert len(choice["token_ids"]) >= 10


def test_fields_that_restrict_tokens_act(http: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 16, "return_token_ids": True}

    def token_ids(**fields: Any) -> list[int]:
        answer = http.post("/v1/completions", json=body | fields).json()
        return list(answer["choices"][0]["token_ids"])

    assert set(token_ids(allowed_token_ids=[70, 71])) <= {70, 71}
    assert set(token_ids(logit_bias={"70": 100})) == {70}
    greedy = {"temperature": 0, "ignore_eos": True}
    text_of = token_ids(**greedy)
    assert text_of[0] not in token_ids(**greedy, logit_bias={str(text_of[0]): -100})


# -- caching and limits ---------------------------------------------------------------------


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


# -- other routes ---------------------------------------------------------------------------


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


# -- many clients ---------------------------------------------------------------------------


def test_64_streams_at_once_are_the_answers_given_one_at_a_time(
    client: OpenAI, base_url: str
) -> None:
    def question(index: int) -> Any:
        return {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": f"What is {index} + {index * 7}?"}],
            "max_tokens": 12,
            "seed": index,
            "temperature": 0.0 if index % 2 else 1.0,
        }

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as many:

            async def ask(index: int) -> str:
                stream = await many.chat.completions.create(**question(index), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(ask, range(64)))

    together = asyncio.run(ask_all())
    for index in range(0, 64, 5):
        alone = client.chat.completions.create(**question(index))
        assert together[index] == alone.choices[0].message.content


def test_a_burst_is_answered_or_refused(http: httpx.Client, base_url: str) -> None:
    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=base_url, timeout=120, limits=limits) as many:
            body = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 2}
            return await asyncio.gather(
                *(many.post("/v1/completions", json=body) for _ in range(1000))
            )

    responses = asyncio.run(burst())
    statuses = {response.status_code for response in responses}
    assert statuses <= {200, 429}
    assert 200 in statuses
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
    assert http.get("/health").status_code == 200


# -- metrics --------------------------------------------------------------------------------


GAUGES_AND_COUNTERS = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total:length",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
)
METRICS = {f"ray_vllm_{name}" for name in GAUGES_AND_COUNTERS} | {
    f"ray_vllm_{name}_count" for name in HISTOGRAMS
}


@cache
def metrics_url() -> str:
    import ray

    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def series() -> dict[str, float]:
    """Ray's exported vLLM metrics, by name and finished_reason."""
    with urllib.request.urlopen(metrics_url(), timeout=10) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("ray_vllm_") and f'model_name="{MODEL_NAME}"' in line:
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
            reason = re.search(r'finished_reason="(\w+)"', labels)
            found[f"{name}:{reason[1]}" if reason else name] = float(value)
    return found


def wait_until(condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Poll the exported metrics, which lag; AssertionError with the last ones after a minute."""
    deadline = time.monotonic() + 60
    while not condition(found := series()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def test_metrics_have_vllms_names(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"model": MODEL_NAME, "prompt": "a", "max_tokens": 3})
    wait_until(lambda found: found.keys() >= METRICS)


def test_a_client_that_leaves_frees_its_blocks(base_url: str) -> None:
    def aborted(found: dict[str, float]) -> float:
        return found.get("ray_vllm_request_success_total:abort", 0.0)

    before = aborted(series())

    def start_and_leave(index: int) -> None:
        body = {
            "model": MODEL_NAME,
            "prompt": f"{index}",
            "max_tokens": SESSION_LEN - 10,
            "ignore_eos": True,
            "stream": index % 2 == 0,
        }
        timeout = httpx.Timeout(60, read=60 if index % 2 == 0 else 0.3)
        with httpx.Client(base_url=base_url, timeout=timeout, verify=False) as client:
            try:
                with client.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_bytes())
            except httpx.ReadTimeout:
                pass  # whole answers take longer; their client gives up

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start_and_leave, range(8)))
    wait_until(
        lambda found: (
            aborted(found) >= before + 4
            and found["ray_vllm_num_requests_running"] == 0
            and found["ray_vllm_kv_cache_usage_perc"] == 0
        )
    )


# -- failure: last, because it costs the others their replica -------------------------------


def kill_engine() -> None:
    """SIGKILL the engine actors of our cluster."""
    from ray._private.state import actors

    engines = [a for a in actors().values() if a["ActorClassName"] == "EngineActor"]
    pids = [actor["Pid"] for actor in engines if actor["State"] == "ALIVE"]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_a_killed_engine_is_reported_and_replaced(client: OpenAI, http: httpx.Client) -> None:
    with client.completions.create(
        model=MODEL_NAME, prompt="a", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
        kill_engine()
        with pytest.raises(openai.APIError, match="the engine stopped"):
            list(stream)
    deadline = time.monotonic() + 120
    while http.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    answer = client.completions.create(model=MODEL_NAME, prompt="a", max_tokens=2, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
