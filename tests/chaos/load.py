"""Clients that know what they must get: streams that go on behind the last event they have, and
whole answers, which the server must try again itself."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve_app.event_ids import HEADER, START

PROXY_S = 30  # for a proxy that was killed to be back
PATIENCE_S = 120  # with one request; whoever waits longer has lost it
PATH = "/v1/completions"
Body = dict[str, Any]
Answer = list[list[int]]  # token ids of each choice


def make_bodies(model: str, count: int, max_tokens: int) -> list[Body]:
    """Every third wants the whole answer; the others stream. All are fixed by their seeds."""
    kinds: list[Body] = [
        {"temperature": 0},
        {"temperature": 1, "top_k": 8, "seed": 7, "n": 2},
        {"temperature": 1, "top_k": 8, "seed": 3, "max_tokens": max_tokens // 3},
    ]
    common: Body = {"model": model, "max_tokens": max_tokens, "ignore_eos": True}
    common |= {"return_token_ids": True}
    return [
        common | kinds[i % 3] | {"stream": i % 3 != 2, "prompt": f"{i} quick foxes"}
        for i in range(count)
    ]


@dataclass(slots=True)
class Count:
    """What became of the requests."""

    complete: int = 0
    resumed: int = 0  # streams that were cut, each time
    refused: int = 0  # streams told to come back, each time
    refused_whole: int = 0  # whole answers, each time: only when one replica after the other dies
    blamed: int = 0  # alone in an engine when it died again and again
    entrance: int = 0  # whole answers asked for again because the proxy itself was killed
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class Load:
    """Keeps clients asking until it is stopped."""

    def __init__(self, url: str, bodies: list[Body], num_clients: int) -> None:
        self.count = Count()
        self.proxy_killed = -1.0  # when; clients may then have lost connections
        self._bodies = bodies
        self._oracle: dict[int, Answer] = {}
        limits = httpx.Limits(max_connections=2 * num_clients)
        self._client = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits)
        self._num_clients = num_clients
        self._stopping = asyncio.Event()

    async def ask_oracle(self) -> None:
        """The answers while nothing is disturbed.

        A draw next to the border between two tokens may fall either way with the rows of a step,
        also in float32: what is not the same alone is not asked for.
        """
        together = await asyncio.gather(*map(self._ask, self._bodies))
        alone = [await self._ask(body) for body in self._bodies]
        assert not self.count.resumed
        kept = [i for i in range(len(self._bodies)) if together[i] == alone[i]]
        self._oracle = {i: alone[i] for i in kept}

    async def run(self, rng: random.Random) -> None:
        clients = [random.Random(rng.random()) for _ in range(self._num_clients)]
        await asyncio.gather(*map(self._ask_on, clients))

    def stop(self) -> None:
        self._stopping.set()

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask_on(self, rng: random.Random) -> None:
        while not self._stopping.is_set():
            index = rng.choice(list(self._oracle))
            try:
                async with asyncio.timeout(PATIENCE_S):
                    answer = await self._ask(self._bodies[index])
            except (httpx.HTTPError, TimeoutError, RefusedError) as error:
                kind = "stream" if self._bodies[index]["stream"] else "whole"
                self.count.lost.append(f"{kind} {index}: {error!r}")
                await asyncio.sleep(1)
                continue
            self.count.complete += 1
            if answer != self._oracle[index]:
                self.count.wrong.append(_difference(index, answer, self._oracle[index]))

    async def _ask(self, body: Body) -> Answer:
        return await (self._stream(body) if body["stream"] else self._whole(body))

    async def _whole(self, body: Body) -> Answer:
        while True:
            asked = time.monotonic()
            try:
                response = await self._client.post(PATH, json=body)
                if response.status_code == 200:
                    return [choice["token_ids"] for choice in response.json()["choices"]]
                if response.status_code == 503 and "retry-after" in response.headers:
                    self.count.refused_whole += 1
                    await asyncio.sleep(0.5)
                    continue
                if self._is_blamed(response):
                    continue
                raise RefusedError(f"{response.status_code}: {response.text}")
            except (httpx.TransportError, RefusedError):
                if self.proxy_killed < 0 or asked > self.proxy_killed + PROXY_S:
                    raise
                self.count.entrance += 1
                await asyncio.sleep(0.2)

    async def _stream(self, body: Body) -> Answer:
        answer: Answer = [[] for _ in range(body.get("n", 1))]
        last: str | None = START
        while last is not None:
            try:
                last = await self._read(body, answer, last)
            except CutError as cut:
                last = cut.last
                self.count.resumed += 1
                await asyncio.sleep(0.2)
        return answer

    async def _read(self, body: Body, answer: Answer, last: str) -> str | None:
        """None at the end of the stream; the same id again when the server said to come back."""
        headers = {HEADER: last}
        try:
            async with self._client.stream("POST", PATH, json=body, headers=headers) as response:
                if response.status_code == 503:
                    self.count.refused += 1
                    await asyncio.sleep(0.5)
                    return last
                if response.status_code != 200:
                    await response.aread()
                    if self._is_blamed(response):
                        return last
                    raise RefusedError(f"{response.status_code}: {response.text}")
                event_id = last
                async for line in response.aiter_lines():
                    field_name, _, value = line.partition(": ")
                    if field_name == "id":
                        event_id = value
                    elif value == "[DONE]":
                        return None
                    elif field_name == "data":
                        event = json.loads(value)
                        if "error" in event:
                            raise CutError(last)
                        for part in event["choices"]:
                            answer[part["index"]] += part["token_ids"]
                        last = event_id
        except httpx.TransportError as error:
            raise CutError(last) from error
        raise CutError(last)

    def _is_blamed(self, response: httpx.Response) -> bool:
        """Whether it ended because engines died with it; that it did not kill them we know."""
        if response.status_code != 500 or "engine_killed" not in response.text:
            return False
        self.count.blamed += 1
        return True


def _difference(index: int, answer: Answer, expected: Answer) -> str:
    for choice, (found, wanted) in enumerate(zip(answer, expected, strict=True)):
        if found != wanted:
            pairs = zip(found, wanted, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), "the end")
            return f"{index}, choice {choice}: from {at} on, {len(found)} of {len(wanted)} tokens"
    return ""


class RefusedError(Exception):
    """An answer that the server should not have given."""


class CutError(Exception):
    """A stream ended before its end; `last` is the last event that came whole."""

    def __init__(self, last: str) -> None:
        super().__init__(last)
        self.last = last
