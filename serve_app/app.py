"""build_app: what `import_path: serve_app.app:build_app` in a Serve config names.

Turns the application's args into a deployment with the resources its engine needs. Runs in a
process of Serve's own; knows no HTTP.
"""

from dataclasses import replace
from typing import Any

import ray
from ray.serve import Application

from engine.config import EngineConfig
from serve_app.app_args import AppArgs
from serve_app.replica import LLMReplica
from serve_app.served_model import Limits

# On a CPU, shares of one core's ticket: tp=2 must fit a machine with two cores.
CPU_REPLICA, CPU_RANK = 0.1, 0.4
GPU_REPLICA, GPU_RANK = 1.0, 1.0


def build_app(args: AppArgs) -> Application:
    """ConfigError or CheckpointError when the args or the engine's settings cannot work."""
    config = _with_device(args.engine_config())
    on_gpu = config.device == "cuda"
    replica = {"CPU": args.cpus_per_replica or (GPU_REPLICA if on_gpu else CPU_REPLICA)}
    rank = {"CPU": args.cpus_per_rank or (GPU_RANK if on_gpu else CPU_RANK)}
    if on_gpu:
        rank["GPU"] = 1.0
    llm_replica: Any = LLMReplica  # a Deployment; mypy does not follow class decorators
    deployment = llm_replica.options(
        ray_actor_options={"num_cpus": replica["CPU"]},
        placement_group_bundles=[replica, *[rank] * config.tp],
        placement_group_strategy="STRICT_PACK",
    )
    app: Application = deployment.bind(
        config=config,
        model_name=args.served_name(config),
        limits=Limits(args.max_body_bytes, args.max_sequences_per_request),
    )
    return app


def _with_device(config: EngineConfig) -> EngineConfig:
    """`auto` becomes cuda when the cluster has a GPU for every rank."""
    if config.device != "auto":
        return config
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return replace(config, device="cuda" if resources.get("GPU", 0) >= config.tp else "cpu")
