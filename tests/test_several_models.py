"""Two models and two replicas behind one address, under Serve, with replicas killed in between."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_NAMESPACE

from serve_app.app import build_app
from serve_app.app_args import AppArgs
from serve_app.replica_count import AUTOSCALING
from tests.tiny_models import write_servable_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

APP = "two"
PATIENCE_S = 60
SCALING = AUTOSCALING | {"min_replicas": 0, "max_replicas": 1, "downscale_to_zero_delay_s": 1}
BODY = {"prompt": "a quick fox", "max_tokens": 150, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "tiny-qwen2"
    write_servable_model("qwen2", path, max_position_embeddings=256)
    return path


@pytest.fixture(scope="module")
def url(base_url: str, tiny_checkpoint: Path, other_checkpoint: Path) -> Iterator[str]:
    """A model that is always there, and one that starts with the first request for it."""
    settings = {"dtype": "float32", "device": "cpu", "cache_max_entry_count": 128}
    settings |= {"num_threads": 1, "seed": 1}
    args = AppArgs.model_validate(
        {
            "models": [
                {"engine": {"model": str(tiny_checkpoint), **settings}, "model_name": "first"},
                {"engine": {"model": str(other_checkpoint), **settings}, "model_name": "org/other"},
            ]
        }
    )
    app: Any = build_app(args)
    (other,) = app._bound_deployment.init_args[2]
    scaled = other._bound_deployment.options(autoscaling_config=SCALING)
    first, specs, _ = app._bound_deployment.init_args
    front = app._bound_deployment.options(
        num_replicas=2, _init_args=(first, specs, [Application(scaled)])
    )
    serve.run(Application(front), name=APP, route_prefix=f"/{APP}")
    yield f"{base_url}/{APP}"
    serve.delete(APP)


def ask(url: str, model: str, **fields: Any) -> dict[str, Any]:
    body = {**BODY, "model": model, **fields}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def num_replicas(deployment: str) -> int:
    status = serve.status().applications[APP].deployments[deployment]
    return sum(count for state, count in status.replica_states.items() if state == "RUNNING")


def test_models_are_listed_and_others_are_not_found(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["first", "org/other"]
        with pytest.raises(openai.NotFoundError, match="this server has 'first', 'org/other'"):
            client.completions.create(model="third", prompt="a")
    assert httpx.get(f"{url}/v1/models/org/other").json()["max_model_len"] is None
    assert num_replicas("org-other") == 0


def test_a_model_without_replicas_answers_from_its_own_weights(
    url: str, other_checkpoint: Path
) -> None:
    """From none to one, the tokens of its own checkpoint, and back to none without a request."""
    answers = [ask(url, "first"), ask(url, "org/other")]
    assert num_replicas("org-other") == 1
    assert answers[0]["choices"] != answers[1]["choices"]
    tokens = httpx.post(f"{url}/tokenize", json={"model": "org/other", "prompt": "a"}).json()
    assert tokens["max_model_len"] == 256
    cards = [httpx.get(f"{url}/v1/models/org/other").json() for _ in range(20)]
    # Of two replicas only those know that had a request for it.
    assert 256 in {card["max_model_len"] for card in cards} <= {256, None}
    deadline = time.monotonic() + PATIENCE_S
    while num_replicas("org-other"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ask(url, "org/other")["choices"] == answers[1]["choices"]


def test_a_beginning_is_found_whichever_replica_a_request_reaches(url: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    found = [0]
    while min(found) < 192:  # the first replica may not have heard of the second yet
        assert time.monotonic() < deadline, found
        fields = {"prompt": "a" * 200, "cache_salt": str(deadline - time.monotonic())}
        ask(url, "first", max_tokens=1, **fields)
        time.sleep(1.2)  # until it is told
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, url, "first", max_tokens=1, **fields) for _ in range(8)]
        usages = [each.result()["usage"] for each in asked]
        found = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]


def kill_replica(deployment: str) -> None:
    handle: Any = serve.get_deployment_handle(deployment, APP)
    entry = handle.attach.remote().result(timeout_s=PATIENCE_S)
    replica = ReplicaID(entry.replica_id, DeploymentID(deployment, APP))
    ray.kill(ray.get_actor(replica.to_full_id_str(), SERVE_NAMESPACE))


def test_streams_of_the_other_model_outlive_its_replica(url: str) -> None:
    undisturbed = [ask(url, "org/other", seed=i, temperature=i % 2)["choices"] for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        asking = [
            pool.submit(ask, url, "org/other", seed=i, temperature=i % 2, cache_salt="again")
            for i in range(8)
        ]
        kill_replica("org-other")
        assert not all(each.done() for each in asking), "too late"
        assert [each.result()["choices"] for each in asking] == undisturbed


def test_a_client_that_leaves_frees_the_other_model_s_engine(url: str) -> None:
    ask(url, "org/other")  # it runs
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={**BODY, "model": "org/other", "max_tokens": 200, "stream": True, "n": 8},
        timeout=PATIENCE_S,
    ) as response:
        next(response.iter_lines())
    handle: Any = serve.get_deployment_handle("org-other", APP)
    deadline = time.monotonic() + PATIENCE_S
    while handle.attach.remote().result(timeout_s=PATIENCE_S).num_sequences:
        assert time.monotonic() < deadline
        time.sleep(0.05)
