"""Scores a demo checkpoint: the share of exactly right answers per task, on held-out examples.

Usage: python -m tools.eval_demo MODEL [--per-task N] [--quant-policy 8] [--failures]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine import LLM, SamplingParams
from engine.models import load_spec
from tools.demo_chat import Chat
from tools.demo_corpus import TASKS, expected_answer, held_out_chat, is_correct
from tools.demo_tokenizer import encode_prompt

MAX_STORY_TOKENS = 256


def evaluate(
    model_path: Path, per_task: int, show_failures: bool = False, **settings: Any
) -> dict[str, float]:
    """Task -> share of right answers; wrong ones are printed to stderr if wanted.

    `settings` are EngineConfig's.
    """
    chats = [held_out_chat(task, index) for task in TASKS for index in range(per_task)]
    right = dict.fromkeys(TASKS, 0)
    answers = answer_chats(model_path, chats, **settings)
    for chat, answer in zip(chats, answers, strict=True):
        correct = is_correct(chat, answer)
        right[chat.task] += correct
        if show_failures and not correct:
            print(f"{chat.task}: {answer!r}, not {expected_answer(chat)!r}", file=sys.stderr)
    return {task: count / per_task for task, count in right.items()}


def answer_chats(model_path: Path, chats: list[Chat], **settings: Any) -> list[str]:
    """The model's last message of each chat, greedy."""
    # Training overwrites its checkpoint: a file of packed weights for each would stay behind.
    llm = LLM(str(model_path), weights_cache=None, dtype="float32", **settings)
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    prompts = [encode_prompt(tokenizer, chat) for chat in chats]
    params = [
        SamplingParams(temperature=0, max_tokens=limit, skip_special_tokens=False)
        for limit in (_answer_limit(tokenizer, chat) for chat in chats)
    ]
    # A chat that fills the context has no answer, and counts as wrong.
    session_len = load_spec(model_path).max_position_embeddings
    fit = [index for index, prompt in enumerate(prompts) if len(prompt) < session_len]
    outputs = llm.generate([prompts[index] for index in fit], [params[index] for index in fit])
    llm.close()
    answers = [""] * len(chats)
    for index, output in zip(fit, outputs, strict=True):
        answers[index] = output.outputs[0].text
    return answers


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--failures", action="store_true", help="print wrong answers to stderr")
    parser.add_argument("--quant-policy", type=int, default=0, help="of the KV cache")
    arguments = parser.parse_args()
    scores = evaluate(
        arguments.model,
        arguments.per_task,
        arguments.failures,
        quant_policy=arguments.quant_policy,
    )
    print(format_scores(scores))
    print(json.dumps({**scores, "overall": overall(scores)}))


if __name__ == "__main__":
    main()
