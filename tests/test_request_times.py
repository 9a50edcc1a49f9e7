"""Where a request's time went: measured by the engine, reported once, told in Server-Timing."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve.metrics import Counter

from engine.outputs import EngineStats, SequenceOutput
from serve_app.metrics import Metrics, SequenceTimer
from serve_app.request_times import RequestTimes
from tests.stub_engine import chat, client_of, served
from tests.test_batcher import Client
from tests.test_metrics import Recorded, recorded, until
from tests.test_scheduler import make_engine, request

__all__ = ["recorded"]


def test_the_engine_times_the_first_token_it_computes() -> None:
    """Also of a stream that another engine began."""
    engine = make_engine(max_num_batched_tokens=8)
    engine.add(request("new", list(range(20)), arrival_time=time.monotonic() - 5))
    engine.add(request("resumed", [1, 2], output_token_ids=[3, 4]))
    timed: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            timed.setdefault(output.request_id, []).append(output)
    for first, *later in timed.values():
        assert first.prefill_time > 0
        assert first.queue_time >= (5 if first.request_id == "new" else 0)
        assert all((each.queue_time, each.prefill_time) == (0, 0) for each in later)
    merged, *later = timed["new"]
    times = merged.queue_time, merged.prefill_time
    for each in later:
        merged.merge(each)
    assert (merged.queue_time, merged.prefill_time) == times


def test_waiting_for_a_step_and_for_another_engine_counts_as_queue() -> None:
    client = Client()
    client.executor.gate.clear()
    client.batcher.submit([request("running", [1])])
    client.executor.entered.wait()
    # The arrival is this process's: what another process's clock says does not matter.
    client.batcher.submit([request("waiting", [2], waited_s=3.0, arrival_time=1e12)])
    time.sleep(0.02)
    client.executor.gate.set()
    client.wait_finished("running", "waiting")
    assert 3.02 <= client.outputs["waiting"].queue_time < 3.02 + 30
    client.batcher.stop()


def test_server_timing_of_a_whole_answer() -> None:
    now = time.perf_counter()
    times = RequestTimes(received=now - 1, submitted=now - 0.9)
    times.on_first(SequenceOutput("a", [1], queue_time=0.0125, prefill_time=0.25))
    assert times.decode is None
    assert "decode" not in times.server_timing()
    times.ended = time.perf_counter()
    parts = parse(times.server_timing())
    assert list(parts) == ["framework", "queue", "prefill", "decode", "total"]
    assert parts["framework"] == pytest.approx(100)
    assert (parts["queue"], parts["prefill"]) == (12.5, 250)
    assert parts["total"] >= 1000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_answers_carry_server_timing(
    tiny_checkpoint: Path, recorded: Recorded, route: str, stream: bool
) -> None:
    async def test() -> httpx.Response:
        async with served(tiny_checkpoint) as (group, app), client_of(app) as client:
            body: dict[str, Any] = chat(stream=stream)
            if route == "/v1/completions":
                body = {"model": "tiny", "prompt": "Hi", "stream": stream}
            answer = asyncio.ensure_future(client.post(route, json=body))
            (request_id,) = await group.wait_for(1)
            group.put(SequenceOutput(request_id, [42], queue_time=0.5, prefill_time=2.0))
            await asyncio.sleep(0.01)
            group.put(SequenceOutput(request_id, [43], finish_reason="length"))
            return await answer

    answer = asyncio.run(asyncio.wait_for(test(), 30))
    assert len(recorded["manta_request_framework_time_seconds"]) == 1
    parts = parse(answer.headers["server-timing"])
    assert (parts["queue"], parts["prefill"]) == (500, 2000)
    assert 0 < parts["framework"] < parts["total"]
    assert ("decode" in parts) == (not stream)  # a stream's headers leave with its first token


def test_the_times_of_the_first_report_are_recorded(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second engine that goes on with a sequence measures its own, which do not count."""

    async def test() -> None:
        metrics = Metrics("tiny", 128)
        timer = SequenceTimer(metrics, num_prompt_tokens=7)
        timer.on_output(SequenceOutput("a", [1], queue_time=0.5, prefill_time=0.25))
        timer.on_output(SequenceOutput("a", [2], queue_time=9.0, prefill_time=9.0))
        timer.on_end(2, "stop")
        assert seconds == {}
        metrics.record_stats(EngineStats())
        await until(lambda: "decode" in seconds)

    seconds: dict[str, float] = {}

    def inc(self: Counter, value: float = 1, tags: Any = None) -> None:
        if self.info["name"] == "manta_request_seconds":
            seconds[tags["part"]] = value

    monkeypatch.setattr(Counter, "inc", inc)
    asyncio.run(test())
    assert recorded["vllm_request_queue_time_seconds"] == [0.5]
    assert recorded["vllm_request_prefill_time_seconds"] == [0.25]
    (decode,) = recorded["vllm_request_decode_time_seconds"]
    assert recorded["vllm_request_inference_time_seconds"] == [0.25 + decode]
    assert seconds == {"queue": 0.5, "prefill": 0.25, "decode": decode}
    assert recorded["vllm_request_prompt_tokens"] == [7]
    assert recorded["vllm_request_generation_tokens"] == [2]


def parse(header: str) -> dict[str, float]:
    """Milliseconds by name."""
    return {name: float(dur) for name, dur in re.findall(r"(\w+);dur=([\d.]+)(?:, |$)", header)}
