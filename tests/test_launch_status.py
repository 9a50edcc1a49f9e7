"""What `manta serve` makes of what Ray tells it: statuses, reasons, proxies; without a cluster."""

import signal
import subprocess
import sys
from typing import Any

import pytest
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ServeStatus,
)

from engine.errors import ConfigError
from serve_app import cluster, launch, serve_instance
from serve_app.cluster import LaunchError
from serve_app.deploy_status import failure, waiting_for
from serve_app.launch_plan import make_plan

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


# -- watching a server --------------------------------------------------------------------------


@pytest.mark.parametrize("left", [{}, {"manta": ApplicationStatus.DELETING}])
def test_a_server_ends_when_somebody_deletes_its_application(
    left: dict[str, ApplicationStatus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `serve shutdown` or over Serve's REST API. First it runs, then it is going or gone."""
    seen = [{"manta": ApplicationStatus.RUNNING}, left]

    def status() -> ServeStatus:
        applications = {name: _status("", app) for name, app in seen.pop(0).items()}
        return ServeStatus(applications=applications)

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(launch, "WATCH_S", 0.0)
    with pytest.raises(LaunchError, match="somebody deleted the application 'manta'"):
        launch._watch(make_plan())
    assert seen == []


@pytest.mark.parametrize(
    ("ready", "late", "error"),
    [([], ["proxy"], TimeoutError), (["dead"], [], RayError)],
)
def test_a_proxy_that_does_not_start_ends_the_command(
    ready: list[str], late: list[str], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(refs: list[str]) -> None:
        if refs:
            raise RayError(refs[0])

    monkeypatch.setattr(ray, "wait", lambda refs, num_returns, timeout: (ready, late))
    monkeypatch.setattr(ray, "get", get)
    proxies: Any = ready + late
    with pytest.raises(error):
        serve_instance.check_proxies(proxies, serve_instance.PROXY_S + 1)
    if late:
        serve_instance.check_proxies(proxies, serve_instance.PROXY_S - 1)  # it still may
    serve_instance.check_proxies([], serve_instance.PROXY_S + 1)  # on a cluster that was joined


@pytest.mark.parametrize(
    ("error", "reason"), [(TimeoutError(), "TimeoutError"), (RayError("a\nb"), "b")]
)
def test_what_ray_raises_becomes_one_line(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cluster, "start", start)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the session's cluster goes on
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)
    with pytest.raises(LaunchError, match=f"^Ray failed: {reason}; its logs are in /"):
        launch.run(make_plan(), address=None, dashboard=False, verbose=False, started=0.0)


def test_nohup_is_respected() -> None:
    script = (
        "import signal as s; from serve_app.launch import _handle_signals as h; h(); "
        "print([s.getsignal(n) is s.SIG_IGN for n in (s.SIGHUP, s.SIGINT, s.SIGTERM)])"
    )
    command = f"trap '' HUP; exec {sys.executable} -c '{script}'"
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["[True,", "False,", "False]"]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_replicas_than_gpus_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    cluster._check_gpus(make_plan(device=device))
    with pytest.raises(ConfigError, match=r"2 replicas of tp 1 .* need 2 GPUs .* has 1"):
        cluster._check_gpus(make_plan(device=device, num_replicas=2))
