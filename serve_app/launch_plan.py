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
from serve_app.app_args import AppArgs, ModelArgs, deployment_names
from serve_app.ports import free_ports
from serve_app.serve_config import DEPLOYMENT, check_deployments, nearest, read_serve_config


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """One of the models behind the address."""

    name: str
    engine: EngineConfig
    args: ModelArgs
    num_replicas: int  # at most at once

    @property
    def num_ranks(self) -> int:
        return self.num_replicas * self.engine.num_ranks


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What to deploy, and where it will be reached."""

    serve_config: dict[str, Any]  # a ServeDeploySchema
    models: list[PlannedModel]
    host: str
    port: int

    @property
    def engine(self) -> EngineConfig:
        """Of the first model."""
        return self.models[0].engine

    @property
    def model_name(self) -> str:
        return ",".join(model.name for model in self.models)

    @property
    def num_replicas(self) -> int:
        """Of all models."""
        return sum(model.num_replicas for model in self.models)

    @property
    def app_name(self) -> str:
        return str(self.serve_config["applications"][0]["name"])

    @property
    def num_ranks(self) -> int:
        """Of all models."""
        return sum(model.num_ranks for model in self.models)


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
    if engine_config is not None or model is not None:
        kept = {key: value for key, value in app["args"].items() if key != "models"}
        if kept != app["args"]:  # this one model takes the place of several
            app["deployments"] = [{"name": DEPLOYMENT}]
        new = {"model": model} if engine_config is None else str(engine_config)
        app["args"] = kept | {"engine": new, "model_name": None}
    if model_name is not None:
        app["args"]["model_name"] = model_name
    overrides = {key: value for key, value in engine.items() if value is not None}
    if model is not None:
        overrides["model"] = model
    args = _app_args(app["args"], path)
    replicas = {
        "num_replicas": num_replicas,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
    }
    one_model_s = overrides | {key: value for key, value in replicas.items() if value is not None}
    if args.models and one_model_s:
        raise ConfigError(
            f"{path} has several models: give {min(one_model_s)} there, to the one it is meant for"
        )
    engines = [each.engine_config(**overrides) for each in args.each]
    names = [each.served_name(settings) for each, settings in zip(args.each, engines, strict=True)]
    resolved = [
        {"engine": settings.to_dict(), "model_name": name}
        for settings, name in zip(engines, names, strict=True)
    ]
    if args.models:
        for entry, values in zip(app["args"]["models"], resolved, strict=True):
            entry.update(values)
    else:
        app["args"] |= resolved[0]
    http = config["http_options"]
    http["host"] = host or http["host"]
    http["port"] = (http["port"] if port is None else port) or free_ports(1)[0]
    deployments = _deployments(app, names, path)
    replica_count.set_replicas(
        deployments[0], path, fixed=num_replicas, least=min_replicas, most=max_replicas
    )
    if log_level is not None:
        config["logging_config"].update(
            log_level=log_level.upper(), enable_access_log=log_level in ("debug", "info")
        )
    models = [
        PlannedModel(name, settings, each, replica_count.max_replicas(deployment))
        for name, settings, each, deployment in zip(
            names, engines, args.each, deployments, strict=True
        )
    ]
    return LaunchPlan(config, models, http["host"], http["port"])


def default_model() -> str:
    """The checkpoint serve_config.yaml names: the demo model."""
    return make_plan().engine.model


def _deployments(app: dict[str, Any], model_names: list[str], path: Path) -> list[dict[str, Any]]:
    """The entry of each model; those that the file leaves out are put there."""
    names = deployment_names(model_names)
    check_deployments(app, names, path)
    for name in names:
        if not any(each["name"] == name for each in app["deployments"]):
            app["deployments"].append({"name": name})
    return [each for name in names for each in app["deployments"] if each["name"] == name]


def _app_args(args: dict[str, Any], path: Path) -> AppArgs:
    try:
        return AppArgs.model_validate(args)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(["args", *map(str, wrong["loc"])])
        message = f": {wrong['msg']}, got {wrong['input']!r}"
        if not wrong["loc"]:  # AppArgs' own words, which begin with the key
            message = "." + wrong["msg"].removeprefix("Value error, ")
        if wrong["type"] == "extra_forbidden":
            known = AppArgs if len(wrong["loc"]) == 1 else ModelArgs
            message = f" is no key of it; {nearest(wrong['loc'][-1], known.model_fields)}"
        if "engine" in wrong["loc"]:  # not each member of the union
            place = place[: place.index("engine") + len("engine")]
            message = f" must be the path of an engine config or a mapping, got {wrong['input']!r}"
        raise ConfigError(f"{path}: {place}{message}") from error
