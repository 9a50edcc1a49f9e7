"""build_app: what `import_path: serve_app.app:build_app` in a Serve config names.

Turns the application's args into a deployment with the resources its engine needs. Runs in a
process of Serve's own; knows no HTTP.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application

from engine.config import EngineConfig
from engine.errors import ConfigError
from serve_app.replica import LLMReplica
from serve_app.served_model import Limits

# On a CPU, shares of one core's ticket: tp=2 must fit a machine with two cores.
CPU_REPLICA, CPU_RANK = 0.1, 0.4
GPU_REPLICA, GPU_RANK = 1.0, 1.0


class AppArgs(BaseModel):
    """`args` of the application."""

    model_config = ConfigDict(extra="forbid")

    engine: str | dict[str, Any]  # path of an engine config, or its settings
    model_name: str | None = None  # what clients call it; default: the checkpoint directory's name
    cpus_per_replica: float | None = Field(default=None, gt=0)
    cpus_per_rank: float | None = Field(default=None, gt=0)
    max_body_bytes: int = Field(default=32 * 1024**2, ge=1024)
    max_sequences_per_request: int = Field(default=128, ge=1)  # prompts × n


def build_app(args: AppArgs) -> Application:
    """ConfigError when the args or the engine's settings cannot work."""
    config = _engine_config(args.engine)
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
        model_name=args.model_name or Path(config.model).name,
        limits=Limits(args.max_body_bytes, args.max_sequences_per_request),
    )
    return app


def _engine_config(engine: str | dict[str, Any]) -> EngineConfig:
    """The settings with absolute paths and a definite device."""
    if isinstance(engine, str):
        config = EngineConfig.from_yaml(_resolve(engine))
    else:
        config = EngineConfig.from_dict(engine, "args.engine")
    device = config.device
    if device == "auto":
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        device = "cuda" if resources.get("GPU", 0) >= config.tp else "cpu"
    return replace(config, model=str(_resolve(config.model)), device=device)


def _resolve(path: str) -> Path:
    """Relative to the working directory, else to the directory that holds this package."""
    for base in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (found := base / path).exists():
            return found
    raise ConfigError(f"{path} does not exist, neither here ({Path.cwd()}) nor beside serve_app")
