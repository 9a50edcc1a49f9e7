"""Chats at the running application, by the openai client; transformers is the oracle."""

from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.api_client import GREEDY, HELLO, continue_greedily, events, reference
from tests.conftest import MODEL_NAME

pytestmark = pytest.mark.ray


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
        "ignore_eos": True,
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
