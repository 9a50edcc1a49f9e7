"""What the serving layer costs: the real application over an engine that computes nothing.

    python -m benchmarks.serving

HTTP, chat template, detokenizer, SSE, Ray calls, batcher and scheduler are the real ones, in
their own processes; this one is the load generator. "Added" times are against the same batcher
and stub in this process, so what is left is HTTP, Ray and text.
"""

import asyncio
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.load import Connection, Reply, chat_body
from benchmarks.record import Table, save, show
from benchmarks.server import running
from benchmarks.stub_executor import StubExecutor, stub_info
from benchmarks.stub_server import PACED_STEP_MS
from engine.batcher import RequestBatcher
from engine.config import EngineConfig
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from serve_app.launch_plan import default_model
from serve_app.ports import free_ports

MODEL_NAME = "demo"
PROXIES = {"HAProxy (`manta serve`)": "haproxy", "Ray's default proxy (`serve run`)": "default"}
NUM_SINGLE = 300  # requests one after the other
STREAMS = 32
THROUGHPUT_STREAMS = 64
STREAM_TOKENS = 900  # the demo's context holds 1024

GOALS = ["≤ 2", "", "≤ 5 (32)", "≤ 5", "", "≥ 50,000"]


@dataclass(frozen=True, slots=True)
class Paced:
    """32 streams at 100 tokens/s each: times of requests joining them, and between tokens."""

    first_ms: float  # p50 until the first token of a request that joins
    gap_p50_ms: float
    gap_p99_ms: float


def main() -> None:
    base_single = _engine_single_ms()
    base_paced = _engine_paced()
    rows: list[list[str | float]] = []
    for name, proxy in PROXIES.items():
        with _server(proxy) as url:
            rows.append([name, *asyncio.run(_measure(url, base_single, base_paced))])
    rows.append(["goal", *GOALS])
    table = Table(
        title=f"Serving layer, stub engine, {STREAMS} streams at 100 tokens/s where not said",
        columns=[
            "proxy",
            "unary p50, ms added",
            "requests/s, 32 at once",
            "TTFT p50, ms added, 1 stream",
            "TTFT p50, ms added, 32 streams",
            "ITL p50 / p99, ms",
            f"tokens/s, {THROUGHPUT_STREAMS} streams",
        ],
        rows=rows,
        notes=[
            f"The engine alone: {base_single:.2f} ms to a token; at {STREAMS} streams a step takes "
            f"{PACED_STEP_MS:g} ms, a request that joins waits {base_paced.first_ms:.1f} ms (p50) "
            f"and tokens are {base_paced.gap_p50_ms:.1f} / {base_paced.gap_p99_ms:.1f} ms apart "
            "(p50 / p99). Load generator and server share the machine's cores."
        ],
    )
    show(table)
    print(save("serving", "Serving layer", [table]))


async def _measure(url: str, base_single: float, base_paced: Paced) -> list[str | float]:
    connection = Connection(url)
    unary, stream = chat_body(MODEL_NAME, 1, stream=False), chat_body(MODEL_NAME, 2, stream=True)
    for _ in range(30):
        await connection.post("/v1/chat/completions", unary)
        await connection.post("/v1/chat/completions", stream)
    unary_ms = [(await _chat(connection, unary)).total * 1000 for _ in range(NUM_SINGLE)]
    first_ms = [(await _chat(connection, stream)).first * 1000 for _ in range(NUM_SINGLE)]
    connection.close()
    rate = await _unary_rate(url)
    paced = await _paced(f"{url}/paced")
    return [
        statistics.median(unary_ms) - base_single,
        rate,
        statistics.median(first_ms) - base_single,
        paced.first_ms - base_paced.first_ms,
        f"{paced.gap_p50_ms:.1f} / {paced.gap_p99_ms:.1f}",
        await _throughput(url),
    ]


def _chat(connection: Connection, body: dict[str, object]) -> Awaitable[Reply]:
    return connection.post("/v1/chat/completions", body)


async def _unary_rate(url: str) -> float:
    """Requests per second with 32 connections that always have one under way."""
    body = chat_body(MODEL_NAME, 1, stream=False)

    async def work(connection: Connection) -> None:
        for _ in range(NUM_SINGLE // 6):
            await _chat(connection, body)
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*[work(Connection(url)) for _ in range(STREAMS)])
    return STREAMS * (NUM_SINGLE // 6) / (time.perf_counter() - started)


async def _throughput(url: str) -> float:
    """Tokens per second when the engine's steps take no time."""
    body = chat_body(MODEL_NAME, STREAM_TOKENS, stream=True)
    connections = [Connection(url) for _ in range(THROUGHPUT_STREAMS)]
    started = time.perf_counter()
    replies = await asyncio.gather(*[_chat(each, body) for each in connections])
    seconds = time.perf_counter() - started
    for each in connections:
        each.close()
    assert all(reply.num_tokens == STREAM_TOKENS for reply in replies)
    return sum(reply.num_tokens for reply in replies) / seconds


async def _paced(url: str) -> Paced:
    """One stream fewer than STREAMS runs all the time; short requests join as the last one."""
    connections = [Connection(url) for _ in range(STREAMS)]
    body = chat_body(MODEL_NAME, STREAM_TOKENS, stream=True)
    probe = chat_body(MODEL_NAME, 2, stream=True)
    for each in connections:
        await _chat(each, probe)
    streams = [asyncio.create_task(_settled(_chat(each, body))) for each in connections[1:]]
    await asyncio.sleep(0.5)
    first: list[float] = []
    while not any(stream.done() for stream in streams):
        first.append((await _chat(connections[0], probe)).first * 1000)
        # Irregular on purpose: requests that follow the step's rhythm would all wait alike.
        await asyncio.sleep(0.001 * (len(first) * 7 % 11))
    replies = await asyncio.gather(*streams)
    for each in connections:
        each.close()
    return _paced_result(first, [reply.arrivals for reply in replies])


async def _settled(reply: Awaitable[Reply]) -> Reply:
    return await reply


def _paced_result(first_ms: list[float], arrivals: list[list[float]]) -> Paced:
    gaps = [
        (later - earlier) * 1000
        for times in arrivals
        for earlier, later in itertools.pairwise(times[20:])
    ]
    quantiles = statistics.quantiles(gaps, n=100)
    return Paced(statistics.median(first_ms), quantiles[49], quantiles[98])


# -- the engine alone ---------------------------------------------------------------------------


class _Engine:
    """A batcher over a stub, and when each request's outputs arrived."""

    def __init__(self, step_ms: float) -> None:
        config = EngineConfig(model=default_model())
        engine = Engine(config, StubExecutor(stub_info(config.model), step_ms / 1000))
        self.arrivals: dict[str, list[float]] = {}
        self._finished = threading.Condition()
        self._unfinished: set[str] = set()
        self._batcher = RequestBatcher(
            engine,
            max_waiting_requests=1000,
            max_waiting_tokens=100_000,
            step_timeout_s=60,
            on_output=lambda consumers: self._take(),
        )

    def submit(self, request_id: str, max_tokens: int) -> float:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._unfinished.add(request_id)
        self.arrivals[request_id] = []
        sent = time.perf_counter()
        self._batcher.submit(
            [EngineRequest(request_id=request_id, prompt_token_ids=[5] * 20, params=params)]
        )
        return sent

    def wait(self, request_id: str) -> None:
        with self._finished:
            self._finished.wait_for(lambda: request_id not in self._unfinished)

    def first_ms(self, request_id: str) -> float:
        """Milliseconds to the first token of a request that joins now."""
        sent = self.submit(request_id, 2)
        self.wait(request_id)
        return (self.arrivals[request_id][0] - sent) * 1000

    def done(self, request_id: str) -> bool:
        return request_id not in self._unfinished

    def _take(self) -> None:
        now = time.perf_counter()
        with self._finished:
            for output in self._batcher.take()[0]:
                self.arrivals[output.request_id].append(now)
                if output.finish_reason is not None:
                    self._unfinished.discard(output.request_id)
            self._finished.notify_all()


def _engine_single_ms() -> float:
    engine = _Engine(0.0)
    return statistics.median(engine.first_ms(str(i)) for i in range(NUM_SINGLE))


def _engine_paced() -> Paced:
    engine = _Engine(PACED_STEP_MS)
    streams = [f"stream {i}" for i in range(STREAMS - 1)]
    for stream in streams:
        engine.submit(stream, STREAM_TOKENS)
    time.sleep(0.5)
    first: list[float] = []
    while not engine.done(streams[0]):
        first.append(engine.first_ms(f"probe {len(first)}"))
        time.sleep(0.001 * (len(first) * 7 % 11))
    return _paced_result(first, [engine.arrivals[stream] for stream in streams])


# -- the server ---------------------------------------------------------------------------------


@contextmanager
def _server(proxy: str) -> Iterator[str]:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "benchmarks.stub_server", proxy, str(port)]
    with running(command, url, f"{url}/paced"):
        yield url


if __name__ == "__main__":
    main()
