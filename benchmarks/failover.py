"""The pause clients see when an engine or a replica is killed: 64 streams through `manta serve`.

    python -m benchmarks.failover [MODEL]

One rank is killed per run (SIGKILL), which one is left to chance: the group ends with any. Beside
it, the same load without a kill; and one of two replicas, whose streams their clients resume by
Last-Event-ID. A stream's pause is the longest time between two of its pieces.
That the tokens are those of an undisturbed run is tests/test_failover.py's subject; here all must
arrive.
"""

import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.load import Connection, Reply, chat_body
from benchmarks.record import Table, save, show
from benchmarks.server import MANTA, running
from serve_app.launch_plan import default_model
from serve_app.ports import free_ports

MODEL_NAME = "bench"
STREAMS = 64
STREAM_TOKENS = 900  # the demo's context holds 1024
KILLS = 3  # runs with one, of each tp
KILL_AFTER_S = 2.0  # from the first request; the streams must last longer
RETRY_S = 0.2  # between a stream's connections


def main(model: str) -> None:
    rows: list[list[str | float]] = []
    for tp in (1, 2):
        with _server(model, tp) as (url, server):
            rows.append([f"tp={tp}, nobody", *_row(asyncio.run(_measure(url, None)))])
            for _ in range(KILLS):
                victim = random.choice(_pids(server, b"ray::EngineActor"))
                rows.append([f"tp={tp}, a rank", *_row(asyncio.run(_measure(url, victim)))])
    with _server(model, 1, "--num-replicas", "2") as (url, server):
        victim = random.choice(_pids(server, b"ray::ServeReplica"))
        replies = asyncio.run(_measure(url, victim, resume=True))
        rows.append(["one of two replicas", *_row(replies)])
    table = Table(
        title=f"{STREAMS} streams while an engine or a replica is killed",
        columns=["killed", "pause p50, s", "pause max, s", "streams complete"],
        rows=[*rows, ["goal", "", "≤ 4", STREAMS]],
        notes=[
            "A pause holds the new process's start, the weights' load and the tokens computed "
            "again; for a replica, the tokens its clients had as well. A stream that in bf16 comes "
            "out different cannot be resumed. Load generator and server share the machine's cores."
        ],
    )
    show(table)
    print(save("failover", "Failover", [table]))


def _row(replies: list[Reply]) -> list[str | float]:
    pauses = [max(b - a for a, b in pairwise(reply.arrivals)) for reply in replies]
    complete = sum(reply.num_tokens == STREAM_TOKENS for reply in replies)
    return [statistics.median(pauses), max(pauses), complete]


async def _measure(url: str, victim: int | None, resume: bool = False) -> list[Reply]:
    body = chat_body(MODEL_NAME, STREAM_TOKENS, stream=True)
    connections = [] if resume else [Connection(url) for _ in range(STREAMS)]
    streams = asyncio.gather(
        *[each.post("/v1/chat/completions", body) for each in connections],
        *[_resuming(f"{url}/v1/chat/completions", body) for _ in range(STREAMS if resume else 0)],
    )
    if victim is not None:
        await asyncio.sleep(KILL_AFTER_S)
        assert not streams.done(), "the streams ended before the kill; give a slower model"
        os.kill(victim, signal.SIGKILL)
    replies = await streams
    for each in connections:
        each.close()
    return replies


async def _resuming(url: str, body: dict[str, Any]) -> Reply:
    """A stream over as many connections as it takes."""
    reply = Reply(time.perf_counter())
    last = "0"
    async with aiohttp.ClientSession() as session:
        while not reply.num_tokens:
            headers = {"Last-Event-ID": last}
            with suppress(aiohttp.ClientError):
                async with session.post(url, json=body, headers=headers) as response:
                    if response.status == 409:  # not the tokens it had
                        return reply
                    last = await _read_events(response, reply, last)
            await asyncio.sleep(RETRY_S)
    return reply


async def _read_events(response: aiohttp.ClientResponse, reply: Reply, last: str) -> str:
    """Notes what arrives; the id of the last whole event, also when the connection breaks."""
    event_id = last
    with suppress(aiohttp.ClientError):
        async for line in response.content:
            name, _, value = line.decode().rstrip().partition(": ")
            if name == "id":
                event_id = value
            elif name == "data" and value != "[DONE]":
                event = json.loads(value)
                last = event_id
                if event.get("choices"):
                    reply.arrivals.append(time.perf_counter())
                elif "usage" in event:
                    reply.num_tokens = event["usage"]["completion_tokens"]
    return last


@contextmanager
def _server(model: str, tp: int, *options: str) -> Iterator[tuple[str, int]]:
    """The address of a server, and its pid."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [MANTA, "serve", model, "--tp", str(tp), "--model-name", MODEL_NAME]
    with running([*command, "--port", str(port), *options], url) as process:
        yield url, process.pid


def _pids(server: int, title: bytes) -> list[int]:
    """Of the server's actors of a class."""
    parents: dict[int, int] = {}
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            pid = int(process.name)
            parents[pid] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if (process / "cmdline").read_bytes().startswith(title):
                found.append(pid)
    return [pid for pid in found if server in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid := parents.get(pid, 0):
        yield pid


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else default_model())
