"""A chat on the terminal, or over a pipe: one line in, one streamed answer out.

Owns the conversation; knows the engine only as something that answers messages piece by piece.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from engine.chat_template import Message
from engine.errors import InvalidRequestError
from engine.sampling_params import SamplingParams

HELP = "/clear forgets the conversation, /exit ends it, Ctrl-C stops an answer"


class ChatModel(Protocol):
    """What a chat needs of engine.LLM."""

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]: ...


def chat(model: ChatModel, params: SamplingParams, system: str | None = None) -> None:
    """Answer lines of stdin until /exit or its end."""
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in _lines():
        match line:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/clear":
                messages = list(start)
                continue
            case _ if line.startswith("/"):
                print(f"{line!r} is no command; {HELP}", file=sys.stderr)
                continue
        messages.append({"role": "user", "content": line})
        answer = _answer(model, messages, params)
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """Stripped lines of stdin; a terminal gets a prompt and line editing."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() history and editing)
    print(HELP)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ").strip()
    print()


def _answer(model: ChatModel, messages: Sequence[Message], params: SamplingParams) -> str | None:
    """Print an answer as it comes; None when the conversation no longer fits."""
    answer = ""
    try:
        for piece in model.stream_chat(messages, params):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    except InvalidRequestError as error:
        print(f"{error}; /clear starts over", file=sys.stderr)
        return None
    print(flush=True)
    return answer
