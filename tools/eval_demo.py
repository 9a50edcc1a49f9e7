"""Scores a demo checkpoint: the share of exactly right answers per task, on held-out examples.

Usage: python -m tools.eval_demo MODEL [--per-task N] [--failures]
"""

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo_chat import Chat
from tools.demo_corpus import TASKS, expected_answer, held_out_chat, is_correct
from tools.demo_tokenizer import END_ID, PAD_ID, encode_prompt
from tools.export_demo import read_weights

BATCH_SIZE = 64
MAX_STORY_TOKENS = 256


def evaluate(model_path: Path, per_task: int, show_failures: bool = False) -> dict[str, float]:
    """Task -> share of right answers; wrong ones are printed to stderr if wanted."""
    chats = [held_out_chat(task, index) for task in TASKS for index in range(per_task)]
    right = dict.fromkeys(TASKS, 0)
    for chat, answer in zip(chats, answer_chats(model_path, chats), strict=True):
        correct = is_correct(chat, answer)
        right[chat.task] += correct
        if show_failures and not correct:
            print(f"{chat.task}: {answer!r}, not {expected_answer(chat)!r}", file=sys.stderr)
    return {task: count / per_task for task, count in right.items()}


def answer_chats(model_path: Path, chats: list[Chat]) -> list[str]:
    """The model's last message of each chat, in batches of like length."""
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    prompts = [encode_prompt(tokenizer, chat) for chat in chats]
    limits = [_answer_limit(tokenizer, chat) for chat in chats]
    order = sorted(range(len(chats)), key=lambda index: (limits[index], len(prompts[index])))
    answers = [""] * len(chats)
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        limit = max(limits[index] for index in batch)
        outputs = generate(model_path, [prompts[index] for index in batch], limit)
        for index, output in zip(batch, outputs, strict=True):
            answers[index] = tokenizer.decode(output, skip_special_tokens=False)
    return answers


def generate(model_path: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations of one batch, up to and without the end token."""
    model = _load_model(model_path, (model_path / "model.safetensors").stat().st_mtime)
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD_ID] * (longest - len(prompt)) + prompt for prompt in prompts])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=(ids != PAD_ID).long(),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=END_ID,
            pad_token_id=PAD_ID,
        )
    rows: list[list[int]] = output[:, longest:].tolist()
    return [row[: row.index(END_ID)] if END_ID in row else row for row in rows]


def format_scores(scores: dict[str, float]) -> str:
    rows = [*scores.items(), ("overall", overall(scores))]
    return "\n".join(f"{task:<12}{score:8.1%}" for task, score in rows)


def overall(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _answer_limit(tokenizer: Tokenizer, chat: Chat) -> int:
    """An answer longer than the right one is wrong already; only stories may have any length."""
    if chat.task == "story":
        return MAX_STORY_TOKENS
    return len(tokenizer.encode(expected_answer(chat)).ids) + 1


@lru_cache(maxsize=1)
def _load_model(model_path: Path, modified: float) -> LlamaForCausalLM:
    """`modified` makes the cache reload a checkpoint that training has overwritten."""
    del modified
    config = json.loads((model_path / "config.json").read_text())
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(read_weights(model_path))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--failures", action="store_true", help="print wrong answers to stderr")
    arguments = parser.parse_args()
    scores = evaluate(arguments.model, arguments.per_task, arguments.failures)
    print(format_scores(scores))
    print(json.dumps({**scores, "overall": overall(scores)}))


if __name__ == "__main__":
    main()
