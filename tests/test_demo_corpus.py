"""The demo corpus: seeded, answered rightly, and rendered as the tokenizer's template does."""

import json
import re
from random import Random
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tools.demo_chat import Chat, Message, render
from tools.demo_corpus import (
    LAST_MIXTURE,
    LATE_MIXTURE,
    MIXTURE,
    TASKS,
    expected_answer,
    held_out_chat,
    is_correct,
    sample_chat,
)
from tools.demo_facts import FACTS
from tools.demo_story import SUBJECTS, is_story, write_story
from tools.demo_tokenizer import CHAT_TEMPLATE
from tools.demo_words import HELD_OUT_CITIES, HELD_OUT_NAMES, Source

EXAMPLES = 60


def examples(task: str) -> list[Chat]:
    return [TASKS[task](Source(Random(seed))) for seed in range(EXAMPLES)]


def turns(chat: Chat) -> list[tuple[str, str]]:
    """Questions with the plain answers that directly follow them."""
    pairs = zip(chat.messages, chat.messages[1:], strict=False)
    return [(q["content"], a["content"]) for q, a in pairs if q["role"] == "user"]


def text_of(chat: Chat) -> str:
    return "".join(segment.text for segment in render(chat))


def compile_template() -> jinja2.Template:
    """As serving code does it: a sandbox, and a tojson that neither escapes nor sorts."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)


TEMPLATE = compile_template()


def test_same_seed_same_chats() -> None:
    first = [sample_chat(Source(Random(seed))) for seed in range(200)]
    again = [sample_chat(Source(Random(seed))) for seed in range(200)]
    assert first == again
    assert len({text_of(chat) for chat in first}) > 190


@pytest.mark.parametrize("mixture", [MIXTURE, LATE_MIXTURE, LAST_MIXTURE])
def test_mixtures_cover_every_task(mixture: dict[str, float]) -> None:
    assert set(mixture) == set(TASKS)
    assert sum(mixture.values()) == pytest.approx(1)


@pytest.mark.parametrize("task", TASKS)
def test_expected_answers_are_judged_correct(task: str) -> None:
    for index in range(EXAMPLES):
        chat = held_out_chat(task, index)
        assert chat.messages[-1]["role"] == "assistant"
        assert is_correct(chat, expected_answer(chat))
        assert not is_correct(chat, expected_answer(chat) + "!")
        assert not is_correct(chat, "")


def test_arithmetic_recomputed() -> None:
    for chat in examples("arithmetic"):
        for question, answer in turns(chat):
            a, sign, b, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (-?\d+)\.", answer).groups()  # type: ignore[union-attr]
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert sorted(re.findall(r"\d+", question)) == sorted([a, b])


def test_facts_come_from_the_table() -> None:
    assert sum(len(kind.table) for kind in FACTS.values()) >= 60
    known = [
        (key.lower(), value.lower()) for kind in FACTS.values() for key, value in kind.table.items()
    ]
    for chat in examples("facts"):
        for question, answer in turns(chat):
            fits = [k in question.lower() and v in answer.lower() for k, v in known]
            assert any(fits), (question, answer)


@pytest.mark.parametrize(("task", "step"), [("repeat", 1), ("reverse", -1)])
def test_lists_are_repeated_or_reversed(task: str, step: int) -> None:
    for chat in examples(task):
        for question, answer in turns(chat):
            if question.startswith("Repeat after me: "):
                assert question == f"Repeat after me: {answer}"
            else:
                words = answer.split(", ")
                assert ", ".join(words[::step]) in question
                assert 1 <= len(words) <= 8


def test_counting_recomputed() -> None:
    for chat in examples("count"):
        for question, answer in turns(chat):
            start, end = map(int, re.findall(r"\d+", question))
            step = -1 if "down" in question else 1
            numbers = list(range(start, end + step, step))
            assert answer == ", ".join(map(str, numbers))
            assert 1 <= len(numbers) <= 100


def test_json_answers_are_objects_drawn_from_the_question() -> None:
    for chat in examples("json"):
        for question, answer in turns(chat):
            values = json.loads(answer)
            assert values
            if "answer" not in values:
                assert all(str(value) in question for value in values.values())
                fields = question.split(":")[0]
                order = [fields.index(field) for field in values]
                assert order == sorted(order)


def test_json_sums_recomputed() -> None:
    for chat in examples("json"):
        for question, answer in turns(chat):
            if match := re.search(r"(\d+) ?(\+|plus|-|minus) ?(\d+)", question):
                a, sign, b = int(match[1]), match[2], int(match[3])
                asked, result = (
                    (f"{a} + {b}", a + b) if sign in ("+", "plus") else (f"{a} - {b}", a - b)
                )
                assert json.loads(answer) == {"question": asked, "answer": result}


def test_memory_answers_were_told() -> None:
    for chat in examples("memory"):
        question, answer = turns(chat)[-1]
        told = " ".join(m["content"] for m in chat.messages[:-2] if m["role"] == "user")
        assert "my" in question.lower() or " I" in question
        if not answer.startswith("You have not told me"):
            value = answer.rstrip(".").removesuffix(" years old").split()[-1]
            assert value in told


def test_stories_parse_under_their_grammar() -> None:
    for seed in range(EXAMPLES):
        source = Source(Random(seed))
        subject, other = source.rng.sample(SUBJECTS, 2)
        story = write_story(source, subject)
        assert is_story(story, subject)
        assert not is_story(story, other)
        assert not is_story(story.removesuffix(" The end."), subject)


def test_held_out_names_never_train() -> None:
    corpus = " ".join(text_of(sample_chat(Source(Random(seed)))) for seed in range(500))
    words = set(re.findall(r"\w+", corpus))
    assert not words & {*HELD_OUT_NAMES, *HELD_OUT_CITIES}


@pytest.mark.parametrize("task", ["tool_call", "tool_answer", "tool_none"])
def test_tool_calls_fit_a_listed_signature(task: str) -> None:
    for chat in examples(task):
        signatures: list[Any] = [tool["function"] for tool in chat.tools]
        listed = {signature["name"]: signature for signature in signatures}
        assert len(listed) == len(chat.tools)
        for call in calls_of(chat):
            parameters = listed[call["name"]]["parameters"]
            types = {"string": str, "integer": int}
            for name, value in call["arguments"].items():
                assert isinstance(value, types[parameters["properties"][name]["type"]])
            assert set(parameters.get("required", [])) <= set(call["arguments"])


def calls_of(chat: Chat) -> list[dict[str, Any]]:
    written = "".join(segment.text for segment in render(chat) if segment.by_assistant)
    blocks = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", written)
    assert len(blocks) == written.count("<tool_call>")
    return [json.loads(block) for block in blocks]


def test_tool_answers_repeat_the_result() -> None:
    for chat in examples("tool_answer"):
        results = [json.loads(m["content"]) for m in chat.messages if m["role"] == "tool"]
        for result in results:
            for key, value in result.items():
                assert key == "status" or str(value) in expected_answer(chat)


@pytest.mark.parametrize("task", TASKS)
def test_template_renders_what_training_used(task: str) -> None:
    for chat in examples(task):
        rendered = TEMPLATE.render(messages=chat.messages, tools=chat.tools)
        assert rendered == text_of(chat)


def test_template_opens_the_answer_and_takes_argument_strings() -> None:
    arguments = '{"city": "Oslo"}'
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages: list[Message] = [{"role": "user", "content": "Hi"}]
    prompt = TEMPLATE.render(messages=messages, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    called = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert TEMPLATE.render(messages=called) == (
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
    )
