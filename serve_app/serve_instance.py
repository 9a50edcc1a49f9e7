"""Ray Serve as `manta serve` uses it: start or join it, deploy, ask, drain, withdraw.

Knows no model and no request. Import it after the environment is set, as cluster.py says.
"""

import asyncio
import contextlib
import time
from typing import Any, TypeAlias

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.api import _create_controller_and_proxy_refs
from ray.serve.config import ControllerOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeDeploySchema

from serve_app.cluster import LaunchError
from serve_app.launch_plan import LaunchPlan
from serve_app.serve_config import DEPLOYMENT

PROXY_S = 60.0  # for HAProxy to start; as long as Serve's own command waits
DRAIN_S = 2.0  # open streams at a stop; Ray's own processes then take 1.4 s to end
PATIENCE_S = 1.0  # beyond that, for the answer
POLL_S = 0.1

Proxies: TypeAlias = "list[ray.ObjectRef[Any]]"  # calls that return once one accepts connections


def deploy(schema: ServeDeploySchema, plan: LaunchPlan, address: str | None) -> Proxies:
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
        global_tracing_config=schema.tracing_config,
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


def check_proxies(proxies: Proxies, seconds: float) -> None:
    """RayError when one failed to start, TimeoutError when one takes too long."""
    if not proxies:
        return
    ready, late = ray.wait(proxies, num_returns=len(proxies), timeout=0)
    ray.get(ready)
    if late and seconds > PROXY_S:
        raise TimeoutError(f"Serve's proxy did not start in {PROXY_S:.0f} s")


def status(plan: LaunchPlan) -> ApplicationStatusOverview:
    status = serve.status().applications.get(plan.app_name)
    if status is None or status.status == ApplicationStatus.DELETING:
        raise LaunchError(
            f"stopped serving {plan.model_name}: somebody deleted the application "
            f"{plan.app_name!r} from the Ray cluster"
        )
    return status


def _client() -> Any:
    return _get_global_client()


def drain(plan: LaunchPlan) -> None:
    """Let open streams finish for a moment; the others end with an error event."""

    async def drain() -> None:
        handle = serve.get_deployment_handle(DEPLOYMENT, plan.app_name)
        await handle.broadcast("drain", DRAIN_S).results_async()

    with contextlib.suppress(RayError, RayServeException, TimeoutError):  # nobody left to ask
        asyncio.run(asyncio.wait_for(drain(), DRAIN_S + PATIENCE_S))


def delete(plan: LaunchPlan) -> None:
    """Leave a joined cluster as it was."""
    with contextlib.suppress(RayError, RayServeException):  # the controller may be gone
        _client().delete_apps([plan.app_name], blocking=False)
        deadline = time.monotonic() + DRAIN_S
        while plan.app_name in serve.status().applications and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if not serve.status().applications:
            serve.shutdown()  # type: ignore[no-untyped-call]
