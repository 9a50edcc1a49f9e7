"""Completions at the running application, by the openai client; transformers is the oracle."""

import copy
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from openai.types import Completion

from tests.api_client import GREEDY, continue_greedily, events, reference
from tests.conftest import MODEL_NAME

pytestmark = pytest.mark.ray


# -- completions -----------------------------------------------------------------------------


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


# -- where a text ends -----------------------------------------------------------------------


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
