"""Texts to calibrate and evaluate on: the documents of a file, or of the built-in set.

A document is a text, or a chat with its tools. Knows files and their lines; no tokenizer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

BUILTIN = "builtin"
DATA = Path(__file__).parent / "data"
# The built-in sets by name, each a list of files to calibrate on, and of files that are held out.
# The demo model knows its own kind of chats and nothing else.
BUILTINS = {
    BUILTIN: (("demo.jsonl", "general.jsonl"), ("demo_held_out.jsonl", "general_held_out.jsonl")),
    "builtin-demo": (("demo.jsonl",), ("demo_held_out.jsonl",)),
}
# Of a file's head; what lies behind is not used. 160 samples of 2,048 tokens are about 1.3 MB of
# English, and tokenising takes 1.4 s per MiB.
MAX_BYTES = 32 * 2**20

_JSONL = (".jsonl", ".ndjson")
_ALLOWED = (
    '{"messages": [{"role": ..., "content": ...}, ...]} with or without "tools", {"text": ...}, '
    '{"prompt": ..., "completion": ...}, or a JSON string'
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a chat in OpenAI's form where `messages` are given."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def joined(self) -> str:
        """The text, or what the messages say, for tokenizers that cannot render a chat."""
        if not self.messages:
            return self.text
        return "\n".join(message["content"] for message in self.messages if message["content"])


@dataclass(frozen=True, slots=True)
class Texts:
    """The documents of one file in their order."""

    documents: tuple[Document, ...]
    raw: bytes  # what was read of it
    cut: bool  # the file goes on after MAX_BYTES


def read_texts(path: Path) -> Texts:
    """JSONL by its name (.jsonl, .ndjson), else one plain text; ConfigError names a bad line."""
    if path.suffix.lower() == ".json":
        raise ConfigError(
            f"{path} is read as neither text nor JSONL; write one JSON value a line and name the "
            "file .jsonl"
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES)
            cut = bool(file.read(1))
    except OSError as error:
        raise ConfigError(
            f"cannot read the calibration text {path}: {error.strerror}. Give a .jsonl or .txt "
            f"file, or one of {', '.join(BUILTINS)}; nothing is downloaded"
        ) from error
    text = _decode(raw, cut, path)
    if path.suffix.lower() in _JSONL:
        lines = text.split("\n")
        documents = tuple(_parse_lines(lines[:-1] if cut else lines, path))
    else:
        documents = (Document(text),)
    return Texts(documents, raw, cut)


def _decode(raw: bytes, cut: bool, path: Path) -> str:
    """A cut may go through a character; its bytes are dropped."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if cut and error.start >= len(raw) - 3:
            return raw[: error.start].decode("utf-8-sig")
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}); give plain text or JSONL, and convert "
            "other formats or encodings"
        ) from error


def _parse_lines(lines: list[str], path: Path) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, number, f"is not JSON ({error})") from error
        yield _document(value, path, number)


def _document(value: Any, path: Path, number: int) -> Document:
    match value:
        case str(text) | {"text": str(text)}:
            return Document(text)
        case {"messages": list(messages), **rest} if messages:
            tools = [] if rest.get("tools") is None else rest["tools"]
            if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
                raise _bad_line(path, number, "has tools that are not a list of objects")
            read = tuple(_message(message, path, number) for message in messages)
            return Document(messages=read, tools=tuple(tools))
        case {"prompt": str(prompt), "completion": str(completion)}:
            return Document(prompt + completion)
        case dict():
            raise _bad_line(path, number, f"has the keys {', '.join(map(repr, value)) or 'none'}")
        case _:
            raise _bad_line(path, number, f"is of type {type(value).__name__}")


def _message(message: Any, path: Path, number: int) -> dict[str, Any]:
    """With a string as content; a message of tool calls may have none."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _bad_line(path, number, "has a message without a role")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise _bad_line(path, number, "has a message whose content is not a string")
    return message | {"content": content}


def _bad_line(path: Path, number: int, found: str) -> ConfigError:
    return ConfigError(f"{path}, line {number} {found}; a line is {_ALLOWED}")
