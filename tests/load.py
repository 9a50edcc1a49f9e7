"""Loads a server must stand behind either proxy, and the metrics that tell what came of them."""

import asyncio
import re
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import httpx

Series = dict[str, float]


def read_series(metrics_url: str) -> Series:
    """Ray's exported metrics of ours by name and finished_reason or part, summed over replicas."""
    with urllib.request.urlopen(metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    found: Series = {}
    for line in lines:
        if match := re.fullmatch(r"(ray_(?:vllm|manta)_\w+)\{(.*)\} (\S+)", line):
            name, labels, value = match.groups()
            label = re.search(r'(?:finished_reason|part)="(\w+)"', labels)
            name = f"{name}:{label[1]}" if label else name
            found[name] = found.get(name, 0.0) + float(value)
    return found


def wait_until(
    metrics_url: str, condition: Callable[[Series], bool], every_s: float = 0.2
) -> Series:
    """Poll the exported metrics, which lag; AssertionError with the last ones after a minute."""
    deadline = time.monotonic() + 60
    while not condition(found := read_series(metrics_url)):
        assert time.monotonic() < deadline, found
        time.sleep(every_s)
    return found


def settled(metrics_url: str) -> Series:
    """Once nothing runs and the metrics, reported every second, have ceased to change."""
    before: Series = {}

    def unchanged(found: Series) -> bool:
        nonlocal before
        counters = {name: value for name, value in found.items() if "_total" in name}
        same = counters == before and not found.get("ray_vllm_num_requests_running")
        before = counters
        return same

    return wait_until(metrics_url, unchanged, every_s=2.5)


def check_burst(base_url: str, model: str) -> None:
    """1000 requests at once are answered, or told to come back."""
    body = {"model": model, "prompt": "a", "max_tokens": 2}

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
    assert httpx.get(f"{base_url}/health").status_code == 200


def check_leaving(base_url: str, model: str, max_tokens: int, metrics_url: str) -> None:
    """8 clients leave, streaming or waiting for the whole answer: every sequence is aborted.

    httpx sends headers and body apart, which HAProxy's splicing of bodies depends on.
    """

    def ended(found: Series, reason: str) -> float:
        return found.get(f"ray_vllm_request_success_total:{reason}", 0.0)

    def start_and_leave(index: int) -> None:
        streams = index % 2 == 0
        body = {"model": model, "prompt": f"{index}", "max_tokens": max_tokens}
        body |= {"ignore_eos": True, "stream": streams}
        timeout = httpx.Timeout(60, read=60 if streams else 0.3)
        with httpx.Client(base_url=base_url, timeout=timeout) as client:
            try:
                with client.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    next(response.iter_bytes())
            except httpx.ReadTimeout:
                assert not streams  # whole answers take longer; their client gives up

    before = settled(metrics_url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start_and_leave, range(8)))
    wait_until(metrics_url, lambda found: ended(found, "abort") >= ended(before, "abort") + 8)
    after = settled(metrics_url)
    assert ended(after, "abort") == ended(before, "abort") + 8
    assert ended(after, "length") == ended(before, "length")  # none ran to its end unheard
    generated = "ray_vllm_generation_tokens_total"
    assert after[generated] - before.get(generated, 0) < 8 * max_tokens
    assert not after.get("ray_vllm_kv_cache_usage_perc")
