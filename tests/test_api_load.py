"""The running application under many clients, leaving clients and a killed engine."""

import asyncio
import os
import re
import signal
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion

from tests.conftest import MODEL_NAME, SESSION_LEN
from tests.load import check_burst, check_leaving, wait_until

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


def test_a_burst_is_answered_or_refused(base_url: str) -> None:
    check_burst(base_url, MODEL_NAME)


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
METRICS |= {
    "ray_manta_request_framework_time_seconds_count",
    *(f"ray_manta_request_seconds_total:{part}" for part in ("framework", "queue", "decode")),
}


@cache
def metrics_url() -> str:
    import ray

    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def test_metrics_have_vllms_names(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"model": MODEL_NAME, "prompt": "a", "max_tokens": 3})
    wait_until(metrics_url(), lambda found: found.keys() >= METRICS)


def test_a_client_that_leaves_frees_its_blocks(base_url: str) -> None:
    check_leaving(base_url, MODEL_NAME, SESSION_LEN - 10, metrics_url())


# -- failure ----------------------------------------------------------------------------------


def kill_engine() -> int:
    """SIGKILL the engine actor of our cluster; returns its pid."""
    from ray._private.state import actors

    engines = [a for a in actors().values() if a["ActorClassName"] == "EngineActor"]
    (pid,) = [int(actor["Pid"]) for actor in engines if actor["State"] == "ALIVE"]
    os.kill(pid, signal.SIGKILL)
    return pid


def replica_logs() -> str:
    from ray._private.worker import global_worker

    assert global_worker.node is not None
    serve = Path(global_worker.node.get_logs_dir_path()) / "serve"
    return "".join(log.read_text() for log in serve.glob("replica_*.log"))


def test_a_stream_outlives_a_killed_engine(client: OpenAI, http: httpx.Client) -> None:
    """In its placement group, where the next actor needs what the killed one held."""

    def stream() -> openai.Stream[Completion]:
        return client.completions.create(
            model=MODEL_NAME,
            prompt="a",
            max_tokens=400,
            temperature=1,
            seed=3,
            stream=True,
            extra_body={"ignore_eos": True},
        )

    undisturbed = "".join(chunk.choices[0].text for chunk in stream())
    with stream() as chunks:
        text = next(chunks).choices[0].text
        pid = kill_engine()
        assert http.get("/health").status_code == 200
        text += "".join(chunk.choices[0].text for chunk in chunks)
    assert text == undisturbed
    (logged,) = re.findall(
        r"the engine died: engine rank 0 died: (?:.|\n)*?exit detail", replica_logs()
    )
    assert f"pid: {pid}" in logged
    assert "exit type: SYSTEM_ERROR" in logged
    wait_until(metrics_url(), lambda found: found.get("ray_manta_engine_recoveries_total", 0) >= 1)
