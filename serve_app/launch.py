"""From a plan to a ready endpoint and back: start, wait until it answers, watch, stop.

Knows no model and no request. Import it after the environment is set, as cluster.py says.
"""

import contextlib
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import NoReturn

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from serve_app import cluster, serve_instance
from serve_app.cluster import LaunchError
from serve_app.deploy_status import failure, waiting_for
from serve_app.launch_plan import LaunchPlan
from serve_app.progress import Progress
from serve_app.ray_watch import RayWatch
from serve_app.serve_instance import Proxies
from serve_app.serve_schema import to_schema

POLL_S = 0.1  # asking the proxy, which holds a request for a while until somebody can answer
STATUS_S = 1.0  # asking Serve whether it still may
WATCH_S = 2.0  # the same while serving
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says


def run(
    plan: LaunchPlan, *, address: str | None, dashboard: bool, verbose: bool, started: float
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. LaunchError or ConfigError when that cannot be.

    `started` is the time.monotonic() from which the seconds until ready are counted.
    """
    schema = to_schema(plan.serve_config)
    watch = None
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
                    watch = RayWatch()
                _handle_signals()  # ray.init puts its own handler of SIGTERM
                progress.say("starting Ray Serve")
                proxies = serve_instance.deploy(schema, plan, address)
                if address is not None:
                    ends.callback(serve_instance.delete, plan)
                progress.say("loading the model")
                if (reason := cluster.obstacle(plan)) is not None:
                    print(f"manta: waiting for the cluster to grow: {reason}", file=sys.stderr)
                url = _url(plan, address)
                _wait(plan, url, proxies, address is not None, progress.say)
            ends.callback(serve_instance.drain, plan)
            seconds = time.monotonic() - started
            print(f"Manta serves {plan.model_name} at {url}/v1 ({seconds:.1f} s)", flush=True)
            if hint is not None:
                print(hint, flush=True)
            _watch(plan)
        except KeyboardInterrupt:
            if watch is not None and watch.death is not None:
                ends.pop_all()  # nobody is left to ask; the guard ends the rest
                raise LaunchError(
                    f"stopped serving {plan.model_name}: {watch.death}; its logs are in "
                    f"{cluster.logs()}"
                ) from None
        except (RayError, RayServeException, TimeoutError) as error:
            *_, reason = str(error).strip().splitlines() or [type(error).__name__]
            raise LaunchError(f"Ray failed: {reason}; its logs are in {cluster.logs()}") from error
        finally:
            _ignore_signals()


def _handle_signals() -> None:
    def interrupt(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    for signum in STOPS:
        if signum != signal.SIGHUP or not under_nohup:
            signal.signal(signum, interrupt)


def _ignore_signals() -> None:
    """A second Ctrl-C must not leave half of the processes behind."""
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)


def _wait(
    plan: LaunchPlan, url: str, proxies: Proxies, joined: bool, say: Callable[[str], None]
) -> None:
    """Until requests are answered. On our own machine the proxy is asked, which is cheap; a
    status call costs driver and controller 20 ms, taken from the processes that load the model."""
    started = time.monotonic()
    while True:
        serve_instance.check_proxies(proxies, time.monotonic() - started)
        status = serve_instance.status(plan)
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
        with _DIRECT.open(f"{url}/health", timeout=STATUS_S):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _watch(plan: LaunchPlan) -> None:
    """Report when the application's health changes; Serve itself mends what it can."""
    last = ApplicationStatus.RUNNING
    while True:
        time.sleep(WATCH_S)
        status = serve_instance.status(plan)
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise LaunchError(f"stopped serving {plan.model_name}: {failure(status)}")
        if status.status != last:
            last = status.status
            print(
                f"{plan.model_name} is {last.value.lower()}. {waiting_for(status) or ''}".strip(),
                flush=True,
            )


def _url(plan: LaunchPlan, address: str | None) -> str:
    """Where a client on this machine reaches the proxy (a wildcard address is no target)."""
    host = plan.host
    if host in ("0.0.0.0", "::"):
        head = str(ray.get_runtime_context().gcs_address).rsplit(":", 1)[0]
        host = "127.0.0.1" if address is None else head
    return f"http://[{host}]:{plan.port}" if ":" in host else f"http://{host}:{plan.port}"
