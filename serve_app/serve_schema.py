"""A Serve config in Ray's own types, with the unknown keys refused that Ray passes over."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from engine.errors import ConfigError
from serve_app.serve_config import FILE, nearest


def to_schema(config: dict[str, Any]) -> ServeDeploySchema:
    """ConfigError names the place, the value at fault and what is allowed."""
    for where, values, model in _levels(config):
        if not isinstance(values, dict):
            continue  # None, or refused below
        for key in values:
            if key not in model.model_fields:
                place = f"{where}.{key}".lstrip(".")
                hint = nearest(key, model.model_fields)
                raise ConfigError(f"{FILE}: unknown key {place}; {hint}")
    try:
        return ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        message = wrong["msg"].removeprefix("Value error, ")
        if not isinstance(wrong["input"], dict | list):
            message += f", got {wrong['input']!r}"
        raise ConfigError(f"{FILE}: {place}: {message}") from error


def _levels(config: dict[str, Any]) -> Iterator[tuple[str, Any, type[BaseModel]]]:
    yield "", config, ServeDeploySchema
    yield "http_options", config.get("http_options"), HTTPOptionsSchema
    yield "logging_config", config.get("logging_config"), LoggingConfig
    for app in config["applications"]:
        yield "applications.0", app, ServeApplicationSchema
        yield "applications.0.logging_config", app.get("logging_config"), LoggingConfig
        for deployment in app["deployments"]:
            where = f"deployments.{deployment['name']}"
            yield where, deployment, DeploymentSchema
            options = deployment.get("ray_actor_options")
            yield f"{where}.ray_actor_options", options, RayActorOptionsSchema
            scaling = deployment.get("autoscaling_config")
            yield f"{where}.autoscaling_config", scaling, AutoscalingConfig
            yield f"{where}.logging_config", deployment.get("logging_config"), LoggingConfig
