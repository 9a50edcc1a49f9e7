"""build_app: what `import_path: serve_app.app:build_app` in a Serve config names.

Turns the application's args into deployments, one per model, with the resources their engines
need; the first one answers HTTP for all. Runs in a process of Serve's own; knows no HTTP.
"""

from typing import Any

import ray
from ray.serve import Application

from serve_app.app_args import AppArgs, ModelArgs, deployment_names
from serve_app.model_spec import Limits, ModelSpec
from serve_app.placement import Placement, with_device
from serve_app.replica import EngineReplica, LLMReplica


def build_app(args: AppArgs) -> Application:
    """ConfigError or CheckpointError when the args or the engines' settings cannot work."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    specs = [_spec(each, resources.get("GPU", 0)) for each in args.each]
    names = deployment_names([spec.name for spec in specs])
    others = [
        _deployment(EngineReplica, name, spec, each).bind(spec)
        for name, spec, each in zip(names[1:], specs[1:], args.each[1:], strict=True)
    ]
    first: Application = _deployment(LLMReplica, names[0], specs[0], args.each[0]).bind(
        specs[0], specs[1:], others
    )
    return first


def _spec(args: ModelArgs, num_gpus: float) -> ModelSpec:
    config = with_device(args.engine_config(), num_gpus)
    limits = Limits(args.max_body_bytes, args.max_sequences_per_request)
    return ModelSpec(args.served_name(config), config, limits, args.cache_aware_routing)


def _deployment(cls: Any, name: str, spec: ModelSpec, args: ModelArgs) -> Any:
    placement = Placement.of(spec.config, args)
    return cls.options(
        name=name,
        ray_actor_options={"num_cpus": placement.replica["CPU"]},
        placement_group_bundles=placement.bundles,
        placement_group_strategy=placement.strategy,
    )
