"""From a plan to a ready endpoint and back: start or join Ray, deploy, wait, watch, end.

Owns the processes it starts: none of them outlives this one. Knows no model and no request.
Import it after the environment is set (launch_env): Ray reads its variables at import.
"""

import contextlib
import logging
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NoReturn

import ray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeDeploySchema

from engine.errors import ConfigError, MantaError
from serve_app.deploy_status import failure, waiting_for
from serve_app.launch_plan import LaunchPlan
from serve_app.processes import descendants, end
from serve_app.progress import Progress

POLL_S = 0.1  # asking the proxy, which holds a request for a while until somebody can answer
STATUS_S = 1.0  # asking Serve whether it still may
WATCH_S = 2.0  # the same while serving
DRAIN_S = 3.0  # open streams at a stop; Ray's own processes then take 1.4 s to end
ENDING_S = 1.0  # what still runs this long after Ray's shutdown is killed
LOGS = "/tmp/ray/session_latest/logs/serve"


class LaunchError(MantaError):
    """The application cannot be served; the message is the reason."""


def run(
    plan: LaunchPlan, *, address: str | None, dashboard: bool, verbose: bool, started: float
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. LaunchError or ConfigError when that cannot be.

    `started` is the time.monotonic() from which the seconds until ready are counted.
    """
    schema = _schema(plan)
    ready = False
    try:
        with Progress("starting Ray") as progress:
            _handle_signals()
            _start_ray(plan, address, dashboard, verbose)
            _handle_signals()  # ray.init puts its own handler of SIGTERM
            progress.say("starting Ray Serve")
            _deploy(schema, plan, address)
            progress.say("loading the model")
            url = _url(plan, address)
            _wait(plan, url, address is not None, progress.say)
        ready = True
        seconds = time.monotonic() - started
        print(f"Manta serves {plan.model_name} at {url}/v1 ({seconds:.1f} s)", flush=True)
        _watch(plan)
    except KeyboardInterrupt:
        pass
    except (RayError, RayServeException, TimeoutError) as error:
        raise LaunchError(
            f"Ray failed: {str(error).strip().splitlines()[-1]}; its logs are in {LOGS}"
        ) from error
    finally:
        _ignore_signals()
        _stop(plan, drain=ready or address is not None, joined=address is not None)


def _handle_signals() -> None:
    def interrupt(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)


def _ignore_signals() -> None:
    """A second Ctrl-C must not leave half of the processes behind."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


def _schema(plan: LaunchPlan) -> ServeDeploySchema:
    try:
        return ServeDeploySchema.model_validate(plan.serve_config)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise ConfigError(f"serve_config.yaml: {where}: {wrong['msg']}") from error


def _start_ray(plan: LaunchPlan, address: str | None, dashboard: bool, verbose: bool) -> None:
    """Join the cluster at `address`, or start one of our own: never the machine's default one."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options: dict[str, Any] = {
        "namespace": "serve",
        "log_to_driver": verbose,
        "logging_level": logging.ERROR,
    }
    if address is not None:
        try:
            ray.init(address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LaunchError(f"cannot join the Ray cluster at {address}: {error}") from error
        return
    # Ray's CPUs are tickets, not cores: a machine with fewer cores than processes still serves.
    cores = len(os.sched_getaffinity(0))
    num_cpus = max(cores, plan.num_ranks + plan.num_replicas)
    try:
        ray.init("local", include_dashboard=dashboard, num_cpus=num_cpus, **options)
    except Exception as error:  # no narrower: that is what ray.init raises when a process is late
        raise LaunchError(
            f"Ray did not start: {error} (on a busy machine try again; its logs are in "
            "/tmp/ray/session_latest/logs)"
        ) from error
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_gpus = int(resources.get("GPU", 0))
    if plan.engine.device == "cuda" and num_gpus < plan.num_ranks:
        raise ConfigError(
            f"{plan.num_replicas} replicas of tp {plan.engine.tp} need {plan.num_ranks} GPUs and "
            f"this machine has {num_gpus}; lower --tp or --num-replicas, use --device cpu, or set "
            "RAY_ADDRESS to a cluster that has them"
        )


def _deploy(schema: ServeDeploySchema, plan: LaunchPlan, address: str | None) -> None:
    serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
    if address is not None and (others := set(serve.status().applications) - {plan.app_name}):
        raise LaunchError(
            f"the Ray cluster at {address} already serves {', '.join(sorted(others))}; deploying "
            "would end that: add Manta to its Serve config instead"
        )
    _client().deploy_apps(schema)


def _wait(plan: LaunchPlan, url: str, joined: bool, say: Callable[[str], None]) -> None:
    """Until requests are answered. On our own machine the proxy is asked, which is cheap; a
    status call costs driver and controller 20 ms, taken from the processes that load the model."""
    while True:
        status = _status(plan)
        if (reason := failure(status)) is not None:
            raise LaunchError(f"cannot serve {plan.model_name}: {reason}")
        if joined and status.status == ApplicationStatus.RUNNING:
            return
        say(waiting_for(status) or "loading the model")
        until = time.monotonic() + STATUS_S
        while time.monotonic() < until:
            if not joined and _answers(url):
                return
            time.sleep(POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=STATUS_S):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _watch(plan: LaunchPlan) -> None:
    """Report when the application's health changes; Serve itself mends what it can."""
    last = ApplicationStatus.RUNNING
    while True:
        time.sleep(WATCH_S)
        status = _status(plan)
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise LaunchError(f"stopped serving {plan.model_name}: {failure(status)}")
        if status.status != last:
            last = status.status
            print(f"{plan.model_name} is {last.value.lower()}. {waiting_for(status) or ''}".strip())


def _status(plan: LaunchPlan) -> ApplicationStatusOverview:
    return serve.status().applications[plan.app_name]


def _url(plan: LaunchPlan, address: str | None) -> str:
    """Where a client on this machine reaches the proxy (a wildcard address is no target)."""
    host = plan.host
    if host in ("0.0.0.0", "::"):
        head = str(ray.get_runtime_context().gcs_address).rsplit(":", 1)[0]
        host = "127.0.0.1" if address is None else head
    return f"http://[{host}]:{plan.port}" if ":" in host else f"http://{host}:{plan.port}"


def _client() -> Any:
    return _get_global_client()


def _stop(plan: LaunchPlan, *, drain: bool, joined: bool) -> None:
    """Let open streams finish for a moment, then end every process that was started."""
    started = descendants(os.getpid())
    if ray.is_initialized() and drain:
        with contextlib.suppress(RayError, RayServeException):  # the controller may be gone
            _drain(plan, joined)
    ray.shutdown()
    end(started, ENDING_S)


def _drain(plan: LaunchPlan, joined: bool) -> None:
    _client().delete_apps([plan.app_name], blocking=False)
    deadline = time.monotonic() + DRAIN_S
    while plan.app_name in serve.status().applications and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if joined and not serve.status().applications:
        serve.shutdown()  # type: ignore[no-untyped-call]
