"""Messages: text reaches the chat template, everything else is refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.protocol.messages import to_template
from tests.bodies import parse_chat, refusal


class Template(SimpleNamespace):
    """A chat template that knows these words."""

    def mentions(self, word: str) -> bool:
        return word in self.words


def convert(*messages: dict[str, Any], words: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    template: Any = Template(words=words)
    return to_template(parse_chat(messages=list(messages)).messages, template)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert convert({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "1"}},
    ],
)
def test_other_parts_are_refused_by_name(part: dict[str, Any]) -> None:
    error = refusal(convert, {"role": "user", "content": [{"type": "text", "text": "a"}, part]})
    assert (error.param, error.code) == ("messages[0].content[1].type", "unsupported")
    assert part["type"] in str(error)


def test_developer_messages_are_system_messages_to_templates_that_do_not_know_them() -> None:
    message = {"role": "developer", "content": "a"}
    assert convert(message)[0]["role"] == "system"
    assert convert(message, words=("developer",))[0]["role"] == "developer"


def test_tool_calls_reach_a_template_that_knows_them() -> None:
    words = ("tool", "tool_calls")
    answer = {"role": "tool", "tool_call_id": "1", "content": "2"}
    converted = convert({"role": "assistant", "tool_calls": [CALL]}, answer, words=words)
    assert converted[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert converted[1] == {"role": "tool", "tool_call_id": "1", "content": "2"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "tool", "tool_call_id": "1", "content": "2"}, "messages[0].role"),
        ({"role": "user", "content": "a", "name": "Ada"}, "messages[0].name"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "messages[0].tool_call_id"),
        ({"role": "user", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "user"}, "messages[0].content"),
    ],
)
def test_what_a_template_would_drop_is_refused(message: dict[str, Any], param: str) -> None:
    assert refusal(convert, message).param == param


def test_arguments_of_a_tool_call_must_be_json() -> None:
    call = CALL | {"function": {"name": "f", "arguments": "{"}}
    message = {"role": "assistant", "tool_calls": [call]}
    error = refusal(convert, message, words=("tool_calls",))
    assert error.param == "messages[0].tool_calls[0].function.arguments"
