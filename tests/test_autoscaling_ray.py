"""Real replicas under Serve: from none to two while requests queue, and back to none."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve import Application

from serve_app.app import build_app
from serve_app.app_args import AppArgs
from serve_app.replica_count import AUTOSCALING

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAME = "scaled"
NUM_REQUESTS = 12
PATIENCE_S = 300
SCALING = AUTOSCALING | {
    "min_replicas": 0,
    "max_replicas": 2,
    "downscale_delay_s": 1,
    "downscale_to_zero_delay_s": 2,
}
BODY = {"model": NAME, "prompt": "abc", "max_tokens": 300, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def scaled(base_url: str, tiny_checkpoint: Path) -> Iterator[str]:
    """An application without a replica, beside the session's."""
    engine = {
        "model": str(tiny_checkpoint),
        "dtype": "float32",
        "device": "cpu",
        "cache_max_entry_count": 256,
        "max_num_seqs": 1,
        "num_threads": 1,
    }
    app: Any = build_app(AppArgs(engine=engine, model_name=NAME))
    deployment = app._bound_deployment.options(autoscaling_config=SCALING)
    serve.run(Application(deployment), name=NAME, route_prefix=f"/{NAME}")
    yield f"{base_url}/{NAME}"
    serve.delete(NAME)


def _num_replicas() -> int:
    deployment = serve.status().applications[NAME].deployments["LLMReplica"]
    return sum(count for state, count in deployment.replica_states.items() if state != "STOPPING")


def test_from_none_to_two_and_back(scaled: str) -> None:
    assert _num_replicas() == 0
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        answers = [
            pool.submit(httpx.post, f"{scaled}/v1/completions", json=BODY, timeout=PATIENCE_S)
            for _ in range(NUM_REQUESTS)
        ]
        seen = set()
        while not all(answer.done() for answer in answers):
            seen.add(_num_replicas())
            time.sleep(0.05)
    assert {answer.result().status_code for answer in answers} == {200}
    assert len({answer.result().json()["choices"][0]["text"] for answer in answers}) == 1
    assert {1, 2} <= seen <= {0, 1, 2}
    deadline = time.monotonic() + PATIENCE_S
    while _num_replicas() > 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
