"""The Ray cluster `manta serve` runs on: one of its own on this machine, or one it joins.

Import it after the environment is set (launch_env): Ray reads its variables at import.
"""

import logging
import os
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir

from engine.errors import ConfigError, MantaError
from serve_app.launch_plan import LaunchPlan
from serve_app.placement import Placement, with_device


class LaunchError(MantaError):
    """The application cannot be served; the message is the reason."""


def join(address: str, *, verbose: bool) -> None:
    try:
        ray.init(address, **_options(verbose))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LaunchError(f"cannot join the Ray cluster at {address}: {error}") from error


def start(plan: LaunchPlan, *, dashboard: bool, verbose: bool) -> str | None:
    """A cluster of this process, never the machine's default one. How to look into it."""
    # Ray's CPUs are tickets, not cores: a machine with fewer cores than processes still serves.
    cores = len(os.sched_getaffinity(0))
    num_cpus = max(cores, plan.num_ranks + plan.num_replicas)
    try:
        context = ray.init(
            "local", include_dashboard=dashboard, num_cpus=num_cpus, **_options(verbose)
        )
    except Exception as error:  # no narrower: that is what ray.init raises when a process is late
        raise LaunchError(
            f"Ray did not start: {error} (on a busy machine try again; its logs are in {logs()})"
        ) from error
    _check_gpus(plan)
    if (reason := obstacle(plan)) is not None:
        raise ConfigError(f"this machine cannot hold the engine: {reason}")
    if not dashboard:
        return None
    mode = "RAY_AUTH_MODE=token " if os.environ["RAY_AUTH_MODE"] == "token" else ""
    url = f"http://{context.dashboard_url}"
    return f"Ray's dashboard is at {url}; try {mode}ray list actors --address {url}"


def logs() -> str:
    """The directory of the last cluster's logs on this machine."""
    directory: str = get_default_ray_temp_dir()  # type: ignore[no-untyped-call]
    return f"{directory}/session_latest/logs"


def obstacle(plan: LaunchPlan) -> str | None:
    """Why the cluster, as it is now, can never hold a replica; None: it can."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    num_gpus = sum(each.get("GPU", 0) for each in resources)
    for model in plan.models:
        placement = Placement.of(with_device(model.engine, num_gpus), model.args)
        if (reason := placement.obstacle(resources)) is not None:
            return reason
    return None


def _options(verbose: bool) -> dict[str, Any]:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return {"namespace": "serve", "log_to_driver": verbose, "logging_level": logging.ERROR}


def _check_gpus(plan: LaunchPlan) -> None:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_gpus = int(resources.get("GPU", 0))
    engines = [with_device(model.engine, num_gpus) for model in plan.models]
    wanted = sum(
        model.num_ranks
        for model, engine in zip(plan.models, engines, strict=True)
        if engine.device == "cuda"
    )
    if num_gpus < wanted:
        raise ConfigError(
            f"{plan.num_replicas} replicas of tp {plan.engine.tp} and pp {plan.engine.pp} need "
            f"{wanted} GPUs and this machine has {num_gpus}; lower --tp, --pp or "
            "the number of replicas, use --device cpu, or set RAY_ADDRESS to a cluster that has "
            "them"
        )
