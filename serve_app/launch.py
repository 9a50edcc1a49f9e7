"""From a plan to a ready endpoint and back: deploy, wait until it answers, watch, withdraw.

Knows no model and no request. Import it after the environment is set, as cluster.py says.
"""

import asyncio
import contextlib
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.api import _create_controller_and_proxy_refs
from ray.serve.config import ControllerOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeDeploySchema

from serve_app import cluster
from serve_app.cluster import LaunchError
from serve_app.deploy_status import failure, waiting_for
from serve_app.launch_plan import LaunchPlan
from serve_app.progress import Progress
from serve_app.serve_config import DEPLOYMENT
from serve_app.serve_schema import to_schema

POLL_S = 0.1  # asking the proxy, which holds a request for a while until somebody can answer
STATUS_S = 1.0  # asking Serve whether it still may
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
PROXY_S = 60.0  # for HAProxy to start; as long as Serve's own command waits
WATCH_S = 2.0  # the same while serving
DRAIN_S = 2.0  # open streams at a stop; Ray's own processes then take 1.4 s to end
LOGS = "/tmp/ray/session_latest/logs/serve"

Proxies: TypeAlias = "list[ray.ObjectRef[Any]]"  # calls that return once one accepts connections


def run(
    plan: LaunchPlan, *, address: str | None, dashboard: bool, verbose: bool, started: float
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. LaunchError or ConfigError when that cannot be.

    `started` is the time.monotonic() from which the seconds until ready are counted.
    """
    schema = to_schema(plan.serve_config)
    with contextlib.ExitStack() as ends:
        ends.callback(ray.shutdown)
        try:
            with Progress("starting Ray") as progress:
                _handle_signals()
                hint = None
                if address is not None:
                    cluster.join(address, verbose=verbose)
                else:
                    hint = cluster.start(plan, dashboard=dashboard, verbose=verbose)
                _handle_signals()  # ray.init puts its own handler of SIGTERM
                progress.say("starting Ray Serve")
                proxies = _deploy(schema, plan, address)
                if address is not None:
                    ends.callback(_delete, plan)
                progress.say("loading the model")
                if (reason := cluster.obstacle(plan)) is not None:
                    print(f"manta: waiting for the cluster to grow: {reason}", file=sys.stderr)
                url = _url(plan, address)
                _wait(plan, url, proxies, address is not None, progress.say)
            ends.callback(_drain, plan)
            seconds = time.monotonic() - started
            print(f"Manta serves {plan.model_name} at {url}/v1 ({seconds:.1f} s)", flush=True)
            if hint is not None:
                print(hint, flush=True)
            _watch(plan)
        except KeyboardInterrupt:
            pass
        except (RayError, RayServeException, TimeoutError) as error:
            raise LaunchError(
                f"Ray failed: {str(error).strip().splitlines()[-1]}; its logs are in {LOGS}"
            ) from error
        finally:
            _ignore_signals()


def _handle_signals() -> None:
    def interrupt(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)


def _ignore_signals() -> None:
    """A second Ctrl-C must not leave half of the processes behind."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


def _deploy(schema: ServeDeploySchema, plan: LaunchPlan, address: str | None) -> Proxies:
    """Start Serve and deploy. Returns the proxies that still start."""
    proxies: Proxies = []
    if address is None:
        proxies = _start_serve(schema)
    else:
        _join_serve(schema, plan, address)
    _client().deploy_apps(schema)
    return proxies


def _start_serve(schema: ServeDeploySchema) -> Proxies:
    """As serve.start does, without its wait for the proxies: the application is built meanwhile.

    That wait was 2.7 of 19 s on two cores that other work took half of.
    """
    _, proxies = _create_controller_and_proxy_refs(
        schema.http_options.model_dump(),
        grpc_options=None,
        global_logging_config=None,
        global_tracing_config=None,
        controller_options=ControllerOptions(),
        proxy_location=schema.proxy_location,
    )
    return proxies


def _join_serve(schema: ServeDeploySchema, plan: LaunchPlan, address: str) -> None:
    serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
    if others := set(serve.status().applications) - {plan.app_name}:
        raise LaunchError(
            f"the Ray cluster at {address} already serves {', '.join(sorted(others))}; deploying "
            "would end that: add Manta to its Serve config instead"
        )


def _wait(
    plan: LaunchPlan, url: str, proxies: Proxies, joined: bool, say: Callable[[str], None]
) -> None:
    """Until requests are answered. On our own machine the proxy is asked, which is cheap; a
    status call costs driver and controller 20 ms, taken from the processes that load the model."""
    started = time.monotonic()
    while True:
        _check_proxies(proxies, time.monotonic() - started)
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


def _check_proxies(proxies: Proxies, seconds: float) -> None:
    """RayError when one failed to start, TimeoutError when one takes too long."""
    if not proxies:
        return
    ready, late = ray.wait(proxies, num_returns=len(proxies), timeout=0)
    ray.get(ready)
    if late and seconds > PROXY_S:
        raise TimeoutError(f"Serve's proxy did not start in {PROXY_S:.0f} s")


def _answers(url: str) -> bool:
    try:
        with _DIRECT.open(f"{url}/health", timeout=STATUS_S):
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
            print(
                f"{plan.model_name} is {last.value.lower()}. {waiting_for(status) or ''}".strip(),
                flush=True,
            )


def _status(plan: LaunchPlan) -> ApplicationStatusOverview:
    status = serve.status().applications.get(plan.app_name)
    if status is None or status.status == ApplicationStatus.DELETING:
        raise LaunchError(
            f"stopped serving {plan.model_name}: somebody deleted the application "
            f"{plan.app_name!r} from the Ray cluster"
        )
    return status


def _url(plan: LaunchPlan, address: str | None) -> str:
    """Where a client on this machine reaches the proxy (a wildcard address is no target)."""
    host = plan.host
    if host in ("0.0.0.0", "::"):
        head = str(ray.get_runtime_context().gcs_address).rsplit(":", 1)[0]
        host = "127.0.0.1" if address is None else head
    return f"http://[{host}]:{plan.port}" if ":" in host else f"http://{host}:{plan.port}"


def _client() -> Any:
    return _get_global_client()


def _drain(plan: LaunchPlan) -> None:
    """Let open streams finish for a moment; the others end with an error event."""

    async def drain() -> None:
        handle = serve.get_deployment_handle(DEPLOYMENT, plan.app_name)
        await handle.broadcast("drain", DRAIN_S).results_async()

    with contextlib.suppress(RayError, RayServeException, TimeoutError):  # nobody left to ask
        asyncio.run(asyncio.wait_for(drain(), DRAIN_S + STATUS_S))


def _delete(plan: LaunchPlan) -> None:
    """Leave a joined cluster as it was."""
    with contextlib.suppress(RayError, RayServeException):  # the controller may be gone
        _client().delete_apps([plan.app_name], blocking=False)
        deadline = time.monotonic() + DRAIN_S
        while plan.app_name in serve.status().applications and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if not serve.status().applications:
            serve.shutdown()  # type: ignore[no-untyped-call]
