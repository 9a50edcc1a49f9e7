"""LaunchPlan: the command line, serve_config.yaml and an engine config made into one, and checked.

Everything that can be wrong without Ray or torch is refused here, in the first half second.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.config import EngineConfig
from engine.errors import ConfigError
from serve_app import replica_count
from serve_app.app_args import AppArgs
from serve_app.ports import free_ports
from serve_app.serve_config import nearest, read_serve_config


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What to deploy, and where it will be reached."""

    serve_config: dict[str, Any]  # a ServeDeploySchema
    engine: EngineConfig
    model_name: str
    num_replicas: int  # at most at once
    host: str
    port: int

    @property
    def app_name(self) -> str:
        return str(self.serve_config["applications"][0]["name"])

    @property
    def app_args(self) -> AppArgs:
        return AppArgs.model_validate(self.serve_config["applications"][0]["args"])

    @property
    def num_ranks(self) -> int:
        return self.num_replicas * self.engine.num_ranks


def make_plan(
    *,
    model: str | None = None,
    engine_config: Path | None = None,
    model_name: str | None = None,
    host: str | None = None,
    port: int | None = None,
    num_replicas: int | None = None,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    log_level: str | None = None,
    **engine: Any,
) -> LaunchPlan:
    """serve_config.yaml with everything that is not None put over it.

    `engine` are fields of EngineConfig. A given model without an engine config takes
    EngineConfig's defaults, not the demo's numbers. ConfigError or CheckpointError says what
    cannot work.
    """
    path, config = read_serve_config()
    (app,) = config["applications"]
    if engine_config is not None:
        app["args"] |= {"engine": str(engine_config), "model_name": None}
    elif model is not None:
        app["args"] |= {"engine": {"model": model}, "model_name": None}
    if model_name is not None:
        app["args"]["model_name"] = model_name
    overrides = {key: value for key, value in engine.items() if value is not None}
    if model is not None:
        overrides["model"] = model
    args = _app_args(app["args"], path)
    settings = args.engine_config(**overrides)
    app["args"] |= {"engine": settings.to_dict(), "model_name": args.served_name(settings)}
    http = config["http_options"]
    http["host"] = host or http["host"]
    http["port"] = (http["port"] if port is None else port) or free_ports(1)[0]
    deployment = app["deployments"][0]
    replica_count.set_replicas(
        deployment, path, fixed=num_replicas, least=min_replicas, most=max_replicas
    )
    if log_level is not None:
        config["logging_config"].update(
            log_level=log_level.upper(), enable_access_log=log_level in ("debug", "info")
        )
    return LaunchPlan(
        serve_config=config,
        engine=settings,
        model_name=app["args"]["model_name"],
        num_replicas=replica_count.max_replicas(deployment),
        host=http["host"],
        port=http["port"],
    )


def default_model() -> str:
    """The checkpoint serve_config.yaml names: the demo model."""
    return make_plan().engine.model


def _app_args(args: dict[str, Any], path: Path) -> AppArgs:
    try:
        return AppArgs.model_validate(args)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = wrong["loc"][0]
        message = f": {wrong['msg']}, got {wrong['input']!r}"
        if wrong["type"] == "extra_forbidden":
            message = f" is no key of it; {nearest(key, AppArgs.model_fields)}"
        if key == "engine":  # not each member of the union
            message = f" must be the path of an engine config or a mapping, got {args.get(key)!r}"
        raise ConfigError(f"{path}: args.{key}{message}") from error
