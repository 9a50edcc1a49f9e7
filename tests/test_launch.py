"""Starting and stopping for real: `manta serve`, and `serve run` on Ray's own proxy."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
)

from serve_app.deploy_status import failure, waiting_for
from serve_app.ports import free_ports
from serve_app.processes import await_end, descendants, end

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DEMO = ROOT / "models" / "demo-awq"
START_S = 180  # a machine busy with other tests; alone it takes 12


def clean_environ() -> dict[str, str]:
    """Without what the test session has set for its own Ray."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"RAY_ADDRESS": "local"}


@contextmanager
def running(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process of ours; whatever happens, it and its descendants are gone afterwards."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=clean_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
        below = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert await_end(below, patience_s=10) == {}  # Ray's agents notice within seconds
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _answer(url: str, model: str) -> str | None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 2 + 3?"}],
        max_tokens=16,
        temperature=0,
    )
    return reply.choices[0].message.content


@pytest.fixture(scope="module")
def manta_url() -> Iterator[str]:
    """`manta serve` with the demo model, from the line it prints when it is ready."""
    with running(BIN / "manta", "serve", "--port", "0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"Manta serves demo at (http://\S+) \(\d+\.\d s\)\n", line)
        assert found is not None, line + process.stdout.read()
        yield found[1]
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.ray
def test_manta_serve_answers_once_it_says_so(manta_url: str) -> None:
    assert _answer(manta_url, "demo")
    assert httpx.get(manta_url.removesuffix("/v1") + "/health").status_code == 200


@pytest.mark.slow
@pytest.mark.ray
def test_serve_run_works_beside_it_on_the_default_proxy(manta_url: str, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["model_name"] = "other"
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}"
    with running(BIN / "serve", "run", path) as process:
        deadline = time.monotonic() + START_S
        while not _healthy(url):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert _answer(f"{url}/v1", "other")
        assert _answer(manta_url, "demo")  # neither took the other's place
    assert process.returncode == 0


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.ray
def test_a_checkpoint_the_engine_refuses_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    """Found out by the engine actor only: its message comes through three layers of Ray."""
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 77}))
    done = subprocess.run(
        [BIN / "manta", "serve", tmp_path, "--port", "0"],
        env=clean_environ(),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"manta: cannot serve {tmp_path.name}: ")
    assert "model.layers." in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_outlives_a_stop_is_killed() -> None:
    stubborn = subprocess.Popen(["sleep", "600"])
    try:
        mine = descendants(os.getpid())
        assert stubborn.pid in mine
        assert await_end({stubborn.pid: mine[stubborn.pid]}, patience_s=0.1) != {}
        assert await_end({stubborn.pid: "another process with that pid"}, patience_s=0.1) == {}
        end({stubborn.pid: mine[stubborn.pid]}, patience_s=0.1)
        assert stubborn.wait(timeout=10) == -signal.SIGKILL
    finally:
        stubborn.kill()


# -- reading Serve's status ---------------------------------------------------------------------

NESTED = """A replica failed to start with exception. Retrying 2 more time(s). Error:
ray::ServeReplica:manta:LLMReplica.initialize_and_get_metadata() (pid=7, ip=127.0.0.1)
  File "serve_app/replica.py", line 42, in __init__
    group = await EngineGroup.start(config)
engine.errors.ConfigError: no room for the KV cache: 0.1 GiB are free on cpu

The above exception was the direct cause of the following exception:

ray.exceptions.RayTaskError: see above
"""


def _status(
    message: str, app: ApplicationStatus = ApplicationStatus.DEPLOYING
) -> ApplicationStatusOverview:
    deployment = DeploymentStatusOverview(
        status=DeploymentStatus.UPDATING,
        status_trigger=DeploymentStatusTrigger.CONFIG_UPDATE_STARTED,
        replica_states={},
        message=message,
    )
    return ApplicationStatusOverview(
        status=app, message="", last_deployed_time_s=0.0, deployments={"LLMReplica": deployment}
    )


def test_our_error_is_final_at_once() -> None:
    reason = failure(_status(NESTED))
    assert reason == "no room for the KV cache: 0.1 GiB are free on cpu"


def test_another_error_is_final_when_serve_gives_up() -> None:
    message = "The deployment failed. Error:\nTraceback\n  File x\nOSError: disk is full\n"
    assert failure(_status(message)) is None
    assert failure(_status(message, ApplicationStatus.DEPLOY_FAILED)) == "OSError: disk is full"
    killed = "The actor died: worker killed due to memory pressure (OOM)"
    reason = failure(_status(killed, ApplicationStatus.DEPLOY_FAILED))
    assert reason is not None
    assert "lower cache_max_entry_count" in reason
    assert failure(_status("", ApplicationStatus.DEPLOY_FAILED)) is not None


def test_a_long_wait_says_what_for() -> None:
    status = _status("Deployment has 1 replicas that have taken more than 30s.\nResources: {}")
    assert waiting_for(status) == "Deployment has 1 replicas that have taken more than 30s."
    assert waiting_for(_status("")) is None
