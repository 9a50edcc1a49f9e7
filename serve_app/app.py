"""build_app: what `import_path: serve_app.app:build_app` in a Serve config names.

Turns the application's args into a deployment with the resources its engine needs. Runs in a
process of Serve's own; knows no HTTP.
"""

from typing import Any

import ray
from ray.serve import Application

from serve_app.app_args import AppArgs
from serve_app.placement import Placement, with_device
from serve_app.replica import LLMReplica
from serve_app.served_model import Limits


def build_app(args: AppArgs) -> Application:
    """ConfigError or CheckpointError when the args or the engine's settings cannot work."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    config = with_device(args.engine_config(), resources.get("GPU", 0))
    placement = Placement.of(config, args)
    llm_replica: Any = LLMReplica  # a Deployment; mypy does not follow class decorators
    deployment = llm_replica.options(
        ray_actor_options={"num_cpus": placement.replica["CPU"]},
        placement_group_bundles=placement.bundles,
        placement_group_strategy=placement.strategy,
    )
    app: Application = deployment.bind(
        config=config,
        model_name=args.served_name(config),
        limits=Limits(args.max_body_bytes, args.max_sequences_per_request),
    )
    return app
