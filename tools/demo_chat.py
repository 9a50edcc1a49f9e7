"""What a chat is: OpenAI-style messages and tool signatures, and their ChatML text.

`render` is the fast twin of the Jinja template in `demo_tokenizer`; a test holds them equal.
"""

import json
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NotRequired, TypeAlias, TypedDict

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

TOOLS_HEADER = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
TOOLS_FOOTER = """
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


class Function(TypedDict):
    name: str
    arguments: dict[str, Json]


class ToolCall(TypedDict):
    type: Literal["function"]
    function: Function


class Message(TypedDict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: NotRequired[list[ToolCall]]


@dataclass(frozen=True)
class Chat:
    """`task` says how the last assistant message is judged, `subject` what a story is about."""

    task: str
    messages: list[Message]
    tools: list[dict[str, Json]] = field(default_factory=list)
    subject: str = ""


class Segment(NamedTuple):
    """A piece of rendered text; the loss is taken on the pieces the assistant wrote."""

    text: str
    by_assistant: bool


def render(chat: Chat) -> list[Segment]:
    segments = []
    messages = chat.messages
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if chat.tools:
        system = "\n\n".join(part for part in (system, _tools_block(chat.tools)) if part)
    if system:
        segments.append(Segment(f"<|im_start|>system\n{system}<|im_end|>\n", False))
    for index, message in enumerate(messages):
        if message["role"] == "user":
            segments.append(Segment(f"<|im_start|>user\n{message['content']}<|im_end|>\n", False))
        elif message["role"] == "tool":
            segments.append(Segment(_tool_response(messages, index), False))
        elif message["role"] == "assistant":
            segments.append(Segment("<|im_start|>assistant\n", False))
            segments.append(Segment(f"{answer_text(message)}<|im_end|>", True))
            segments.append(Segment("\n", False))
    return segments


def answer_text(message: Message) -> str:
    """What the assistant writes: its text, then one block per tool call."""
    calls = [
        f"<tool_call>\n{_call_text(call['function'])}\n</tool_call>"
        for call in message.get("tool_calls", [])
    ]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def dump(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _call_text(function: Function) -> str:
    return dump({"name": function["name"], "arguments": function["arguments"]})


def _tools_block(tools: list[dict[str, Json]]) -> str:
    return TOOLS_HEADER + "".join(f"\n{dump(tool)}" for tool in tools) + TOOLS_FOOTER


def _tool_response(messages: list[Message], index: int) -> str:
    """Consecutive tool results share one user turn."""
    opens = index == 0 or messages[index - 1]["role"] != "tool"
    closes = index + 1 == len(messages) or messages[index + 1]["role"] != "tool"
    text = f"\n<tool_response>\n{messages[index]['content']}\n</tool_response>"
    return ("<|im_start|>user" if opens else "") + text + ("<|im_end|>\n" if closes else "")
