"""Messages of a chat: OpenAI's shapes in, what a chat template reads out.

Text only. Whether a role or a tool call means anything is the template's to say.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from serve_app.errors import invalid, shown, unsupported
from serve_app.protocol.refused import UNSUPPORTED
from serve_app.protocol.strict import Strict

if TYPE_CHECKING:
    from engine.chat_template import ChatTemplate


FRAME = 20  # characters of text that take as long as a template needs for a message


class TextPart(Strict):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, value: Any) -> Any:
        """Other parts are refused by their type, not by what they hold."""
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "text":
            context = {"field": "type", "kind": shown(kind)}
            raise PydanticCustomError(UNSUPPORTED, " as {kind}; send parts of type text", context)
        return value


class FunctionCall(Strict):
    name: str
    arguments: Annotated[str, Field(description="a JSON object, as a string")]


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    # Parts of answers that clients send back as they came; with a value they are refused.
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning_content: Any = None

    @property
    def text(self) -> str | None:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content

    @property
    def size(self) -> int:
        """What turning it into tokens costs, in characters; its frame counts as some."""
        return FRAME * (1 + len(self.tool_calls or ())) + self.num_characters

    @property
    def num_characters(self) -> int:
        """Of everything in it that becomes tokens."""
        calls = sum(len(call.function.arguments) for call in self.tool_calls or ())
        return len(self.text or "") + calls


Messages = Annotated[list[Message], Field(fail_fast=True)]
_REFUSED = ("name", "refusal", "annotations", "audio", "function_call", "reasoning_content")


def to_template(
    messages: Sequence[Message], template: "ChatTemplate | None"
) -> list[dict[str, Any]]:
    """The dicts a template reads. Refuses what it would drop without a word."""
    return [_to_template(f"messages[{i}]", m, template) for i, m in enumerate(messages)]


def _to_template(path: str, message: Message, template: "ChatTemplate | None") -> dict[str, Any]:
    for field in _REFUSED:
        if getattr(message, field) not in (None, []):
            raise unsupported(f"{path}.{field}")
    converted: dict[str, Any] = {"role": message.role, "content": message.text}
    if template is not None and message.role == "developer" and not template.mentions("developer"):
        converted["role"] = "system"  # OpenAI's newer name for it
    if message.role == "tool":
        if template is not None and not template.mentions("tool"):
            raise unsupported(f"{path}.role", ": this model's chat template has no tool role")
        if message.tool_call_id is None:
            raise invalid(f"{path}.tool_call_id is missing", f"{path}.tool_call_id")
        converted["tool_call_id"] = message.tool_call_id
    elif message.tool_call_id is not None:
        raise invalid(
            f"{path}.tool_call_id belongs to messages of role tool", f"{path}.tool_call_id"
        )
    if message.tool_calls:
        converted["tool_calls"] = _tool_calls(path, message, template)
    elif message.text is None:
        raise invalid(f"{path}.content is missing", f"{path}.content")
    return converted


def _tool_calls(
    path: str, message: Message, template: "ChatTemplate | None"
) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what templates print."""
    assert message.tool_calls is not None
    path = f"{path}.tool_calls"
    if message.role != "assistant":
        raise invalid(f"{path} belong to messages of role assistant", path)
    if template is not None and not template.mentions("tool_calls"):
        raise unsupported(path, ": this model's chat template has none")
    converted = []
    for i, call in enumerate(message.tool_calls):
        try:
            arguments = json.loads(call.function.arguments)
        except ValueError as error:
            param = f"{path}[{i}].function.arguments"
            raise invalid(f"{param} must be JSON: {error}", param) from None
        if not isinstance(arguments, dict):
            param = f"{path}[{i}].function.arguments"
            raise invalid(f"{param} must be a JSON object, got {shown(arguments)}", param)
        function = {"name": call.function.name, "arguments": arguments}
        converted.append({"id": call.id, "type": "function", "function": function})
    return converted
