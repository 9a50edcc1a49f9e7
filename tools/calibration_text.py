"""Writes the built-in calibration text, engine/quantize/data/*.jsonl; the same on every machine.

    python -m tools.calibration_text

Chats of the demo corpus, with and without tools, and texts and chats of other registers, in no
order. The held-out files have their own seeds, names and towns.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from tools.calibration_code import code_answer, code_text
from tools.calibration_languages import foreign_text, translation
from tools.calibration_prose import ANSWERS, TEXTS
from tools.demo_chat import Message, assistant, user
from tools.demo_corpus import SYSTEM_PROMPTS, TASKS
from tools.demo_words import Source

DIRECTORY = Path(__file__).parents[1] / "engine" / "quantize" / "data"

Line = dict[str, object]
Mixture = dict[Callable[[Source], Line], float]


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for name in FILES:
        (DIRECTORY / name).write_text(render(name), encoding="utf-8")


def render(name: str) -> str:
    """The text of one of FILES: lines of JSON."""
    mixture, size, held_out = FILES[name]
    source = Source(Random(f"calibration text {name}"), held_out)
    kinds, weights = zip(*mixture.items(), strict=True)
    lines: dict[str, int] = {}  # without repetitions
    while sum(lines.values()) < size:
        (write,) = source.rng.choices(kinds, weights)
        line = json.dumps(write(source), ensure_ascii=False) + "\n"
        lines[line] = len(line.encode())
    return "".join(lines)


def _demo_chat(source: Source) -> Line:
    chat = source.pick(list(TASKS.values()))(source)
    line: Line = {"messages": chat.messages}
    return line | {"tools": chat.tools} if chat.tools else line


def _chat(source: Source) -> Line:
    """One to four turns of other registers."""
    messages: list[Message] = []
    if source.chance(0.4):
        messages.append({"role": "system", "content": source.pick(SYSTEM_PROMPTS)})
    for _ in range(source.pick((1, 1, 1, 2, 2, 3, 4))):
        write = source.pick((code_answer, translation, *ANSWERS))
        question, answer = write(source)
        messages += [user(question), assistant(answer)]
    return {"messages": messages}


def _text(source: Source) -> Line:
    return {"text": source.pick(TEXTS)(source)}


def _code(source: Source) -> Line:
    return {"text": code_text(source)}


def _foreign(source: Source) -> Line:
    return {"text": foreign_text(source)}


# Shares of lines; a line has 270 to 900 bytes.
DEMO: Mixture = {_demo_chat: 1.0}
GENERAL: Mixture = {_chat: 0.32, _text: 0.34, _code: 0.20, _foreign: 0.14}
# name -> mixture, bytes, held out
FILES = {
    "demo.jsonl": (DEMO, 240_000, False),
    "demo_held_out.jsonl": (DEMO, 62_000, True),
    "general.jsonl": (GENERAL, 400_000, False),
    "general_held_out.jsonl": (GENERAL, 60_000, True),
}

if __name__ == "__main__":
    main()
