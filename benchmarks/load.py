"""A load generator on bare asyncio: HTTP/1.1 and server-sent events, parsed as little as possible.

A client library would cost more per token than the server does, and both share the machine.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT = re.compile(rb'"prompt_tokens":\s*(\d+)')
_CACHED = re.compile(rb'"cached_tokens":\s*(\d+)')
_TEXT = re.compile(rb'"content":\s*"[^"]')  # the opening event has the role and empty content
_TAIL = 512  # bytes kept of a body: the usage comes last


@dataclass(slots=True)
class Reply:
    """When what arrived, in seconds of time.perf_counter()."""

    sent: float
    arrivals: list[float] = field(default_factory=list)  # pieces with text
    status: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def total(self) -> float:
        return self.arrivals[-1] - self.sent


class Connection:
    """One kept-alive connection; one request at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 80
        self._prefix = parts.path.rstrip("/")
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Send a request and read its reply to the end. Raises ConnectionError if it is cut.

        A kept-alive connection may have been closed meanwhile, as HAProxy does when it reloads:
        then the request goes to a new one.
        """
        if self._writer is not None:
            try:
                return await self._exchange(path, body)
            except ConnectionResetError:
                self._writer.close()
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise
                self._writer.close()
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return await self._exchange(path, body)

    async def _exchange(self, path: str, body: Mapping[str, Any]) -> Reply:
        assert self._reader is not None
        assert self._writer is not None
        content = json.dumps(body).encode()
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self._writer.write(head.encode() + content)
        reply = Reply(time.perf_counter())
        await _read(self._reader, reply)
        return reply

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


async def _read(reader: asyncio.StreamReader, reply: Reply) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    reply.status = int(head.split(b" ", 2)[1])
    length = re.search(rb"content-length: (\d+)", head)
    tail = b""
    if length is not None:
        tail = await reader.readexactly(int(length[1]))
        reply.arrivals.append(time.perf_counter())
    else:
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            piece = await reader.read(65536)
            if not piece:
                raise ConnectionError("the server closed the connection within a reply")
            if _TEXT.search(piece):
                reply.arrivals.append(time.perf_counter())
            tail = (tail + piece)[-_TAIL:]
    reply.num_tokens = _last(_USAGE, tail)
    reply.num_prompt_tokens = _last(_PROMPT, tail)
    reply.num_cached_tokens = _last(_CACHED, tail)
    if reply.status != 200:
        raise RuntimeError(f"the server answered {reply.status}: {tail.decode()[-_TAIL:]}")


def _last(number: re.Pattern[bytes], text: bytes) -> int:
    found = number.findall(text)
    return int(found[-1]) if found else 0


def chat_body(model: str, max_tokens: int, stream: bool) -> dict[str, Any]:
    """A short chat that generates exactly max_tokens."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "What is 12 + 30?"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if stream else {})
