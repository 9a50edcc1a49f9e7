"""The running application under many clients, leaving clients and a dying engine."""

import asyncio
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import aiohttp
import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.api_client import GREEDY
from tests.conftest import MODEL_NAME, SESSION_LEN

pytestmark = pytest.mark.ray


# -- many clients ----------------------------------------------------------------------------


def test_64_streams_at_once_are_the_answers_given_one_at_a_time(
    client: OpenAI, base_url: str
) -> None:
    def question(index: int) -> Any:
        return {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": f"What is {index} + {index * 7}?"}],
            "max_tokens": 12,
            "seed": index,
            "temperature": 0.0 if index % 2 else 1.0,
        }

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as many:

            async def ask(index: int) -> str:
                stream = await many.chat.completions.create(**question(index), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(ask, range(64)))

    together = asyncio.run(ask_all())
    for index in range(0, 64, 5):
        alone = client.chat.completions.create(**question(index))
        assert together[index] == alone.choices[0].message.content


def test_a_burst_is_answered_or_refused(http: httpx.Client, base_url: str) -> None:
    body = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 2}

    async def ask(session: aiohttp.ClientSession) -> int:
        async with session.post(f"{base_url}/v1/completions", json=body) as response:
            if response.status == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert (await response.json())["error"]["code"] == "queue_full"
            return response.status

    async def burst() -> set[int]:
        connector = aiohttp.TCPConnector(limit=0)  # 1000 connections; httpx takes 10 s to open them
        async with aiohttp.ClientSession(connector=connector) as session:
            return set(await asyncio.gather(*(ask(session) for _ in range(1000))))

    statuses = asyncio.run(burst())
    assert statuses <= {200, 429}
    assert 200 in statuses
    assert http.get("/health").status_code == 200


# -- metrics ---------------------------------------------------------------------------------


GAUGES_AND_COUNTERS = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total:length",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
)
METRICS = {f"ray_vllm_{name}" for name in GAUGES_AND_COUNTERS} | {
    f"ray_vllm_{name}_count" for name in HISTOGRAMS
}


@cache
def metrics_url() -> str:
    import ray

    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def series() -> dict[str, float]:
    """Ray's exported vLLM metrics, by name and finished_reason."""
    with urllib.request.urlopen(metrics_url(), timeout=10) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("ray_vllm_") and f'model_name="{MODEL_NAME}"' in line:
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
            reason = re.search(r'finished_reason="(\w+)"', labels)
            found[f"{name}:{reason[1]}" if reason else name] = float(value)
    return found


def wait_until(condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Poll the exported metrics, which lag; AssertionError with the last ones after a minute."""
    deadline = time.monotonic() + 60
    while not condition(found := series()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def test_metrics_have_vllms_names(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"model": MODEL_NAME, "prompt": "a", "max_tokens": 3})
    wait_until(lambda found: found.keys() >= METRICS)


def test_a_client_that_leaves_frees_its_blocks(base_url: str) -> None:
    def aborted(found: dict[str, float]) -> float:
        return found.get("ray_vllm_request_success_total:abort", 0.0)

    before = aborted(series())

    def start_and_leave(index: int) -> None:
        body = {
            "model": MODEL_NAME,
            "prompt": f"{index}",
            "max_tokens": SESSION_LEN - 10,
            "ignore_eos": True,
            "stream": index % 2 == 0,
        }
        timeout = httpx.Timeout(60, read=60 if index % 2 == 0 else 0.3)
        with httpx.Client(base_url=base_url, timeout=timeout, verify=False) as client:
            try:
                with client.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_bytes())
            except httpx.ReadTimeout:
                pass  # whole answers take longer; their client gives up

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start_and_leave, range(8)))
    wait_until(
        lambda found: (
            aborted(found) >= before + 4
            and found["ray_vllm_num_requests_running"] == 0
            and found["ray_vllm_kv_cache_usage_perc"] == 0
        )
    )


# -- failure: last, because it costs the others their replica --------------------------------


def kill_engine() -> None:
    """SIGKILL the engine actors of our cluster."""
    from ray._private.state import actors

    engines = [a for a in actors().values() if a["ActorClassName"] == "EngineActor"]
    pids = [actor["Pid"] for actor in engines if actor["State"] == "ALIVE"]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_a_killed_engine_is_reported_and_replaced(client: OpenAI, http: httpx.Client) -> None:
    with client.completions.create(
        model=MODEL_NAME, prompt="a", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
        kill_engine()
        with pytest.raises(openai.APIError, match="the engine stopped"):
            list(stream)
    deadline = time.monotonic() + 120
    while http.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    answer = client.completions.create(model=MODEL_NAME, prompt="a", max_tokens=2, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
