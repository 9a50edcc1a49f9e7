"""What the API tests share: requests, the transformers oracle, and reading a stream."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from openai.types.chat import ChatCompletionMessageParam

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "The quick brown fox"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}


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
