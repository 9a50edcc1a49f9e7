"""Messages of a chat: OpenAI's shapes in, what a chat template reads out.

Text only. Whether a role or a tool call means anything is the template's to say.
"""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from serve_app.errors import invalid, unsupported
from serve_app.protocol.parse import UNSUPPORTED
from serve_app.protocol.sampling import Strict

if TYPE_CHECKING:
    from engine.chat_template import ChatTemplate


def _text_only(kind: str) -> str:
    if kind != "text":
        raise PydanticCustomError(
            UNSUPPORTED, "{kind} parts; send parts of type text", {"kind": kind}
        )
    return kind


class TextPart(Strict):
    type: Annotated[str, AfterValidator(_text_only), Field(description="text")]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: Annotated[str, Field(description="a JSON object, as a string")]


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    function_call: Any = None
    audio: Any = None

    @property
    def text(self) -> str | None:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content


def to_template(messages: list[Message], template: "ChatTemplate | None") -> list[dict[str, Any]]:
    """The dicts a template reads. Refuses what it would drop without a word."""
    return [_to_template(f"messages[{i}]", m, template) for i, m in enumerate(messages)]


def _to_template(path: str, message: Message, template: "ChatTemplate | None") -> dict[str, Any]:
    for field in ("name", "refusal", "function_call", "audio"):
        if getattr(message, field) is not None:
            raise unsupported(f"{path}.{field}")
    converted: dict[str, Any] = {"role": message.role, "content": message.text}
    if template is not None and message.role == "developer" and not template.mentions("developer"):
        converted["role"] = "system"  # OpenAI's newer name for it
    if message.role == "tool":
        if template is not None and not template.mentions("tool"):
            raise unsupported(f"{path}.role", ": this model's chat template has no tool role")
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
        function = {"name": call.function.name, "arguments": arguments}
        converted.append({"id": call.id, "type": "function", "function": function})
    return converted
