"""A Serve config in Ray's own types, with the unknown keys refused that Ray passes over."""

from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ValidationError
from ray._common.utils import import_attr
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
    TracingConfig,
)

from engine.errors import ConfigError
from serve_app.autoscaling import QueueDepthSettings
from serve_app.serve_config import FILE, POLICY, nearest


def to_schema(config: dict[str, Any]) -> ServeDeploySchema:
    """ConfigError names the place, the value at fault and what is allowed."""
    for where, values, known in _levels(config):
        if not isinstance(values, dict):
            continue  # None, or refused below
        for key in values:
            if key not in known:
                place = f"{where}.{key}".lstrip(".")
                raise ConfigError(f"{FILE}: unknown key {place}; {nearest(key, known)}")
    _check_scaling(config)
    try:
        schema = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        raise _refusal(error) from error
    _check_tracing(schema.tracing_config)
    return schema


def _levels(config: dict[str, Any]) -> Iterator[tuple[str, Any, Collection[str]]]:
    """Every mapping of the file, where it stands, and the keys it may have."""
    yield "", config, _keys(ServeDeploySchema)
    yield "http_options", config.get("http_options"), _keys(HTTPOptionsSchema)
    yield "logging_config", config.get("logging_config"), _keys(LoggingConfig)
    yield "tracing_config", config.get("tracing_config"), _keys(TracingConfig)
    for app in config["applications"]:
        yield "applications.0", app, _keys(ServeApplicationSchema)
        yield "applications.0.logging_config", app.get("logging_config"), _keys(LoggingConfig)
        for deployment in app["deployments"]:
            where = f"deployments.{deployment['name']}"
            yield where, deployment, _keys(DeploymentSchema)
            options = deployment.get("ray_actor_options")
            yield f"{where}.ray_actor_options", options, _keys(RayActorOptionsSchema)
            yield f"{where}.logging_config", deployment.get("logging_config"), _keys(LoggingConfig)
            scaling = deployment.get("autoscaling_config")
            yield f"{where}.autoscaling_config", scaling, _keys(AutoscalingConfig)
            policy = scaling.get("policy") if isinstance(scaling, dict) else None
            yield f"{where}.autoscaling_config.policy", policy, _keys(AutoscalingPolicy)


def _keys(model: type[BaseModel]) -> Collection[str]:
    return model.model_fields


def _check_scaling(config: dict[str, Any]) -> None:
    """What Serve and our policy would refuse in the controller, where nobody sees it."""
    for app in config["applications"]:
        for deployment in app["deployments"]:
            scaling = deployment.get("autoscaling_config")
            if not isinstance(scaling, dict):
                continue
            place = f"deployments.{deployment['name']}.autoscaling_config"
            try:
                checked = AutoscalingConfig.model_validate(scaling)
            except ValidationError as error:
                raise _refusal(error, place) from error
            except (ImportError, AttributeError) as error:
                raise ConfigError(f"{FILE}: {place}.policy.policy_function: {error}") from error
            if checked.policy.policy_function == POLICY:
                _check_policy(checked.policy.policy_kwargs, f"{place}.policy.policy_kwargs")


def _check_tracing(tracing: TracingConfig | None) -> None:
    """What replicas would fail to import, each time they start."""
    if tracing is None or not tracing.enabled or not tracing.exporter_import_path:
        return
    try:
        import_attr(tracing.exporter_import_path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{FILE}: tracing_config.exporter_import_path: {error}") from error


def _check_policy(settings: dict[str, Any], place: str) -> None:
    known = [field.name for field in fields(QueueDepthSettings)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"{FILE}: unknown key {place}.{key}; {nearest(key, known)}")
    try:
        QueueDepthSettings(**settings)
    except ValueError as error:
        raise ConfigError(f"{FILE}: {place}: {error}") from error


def _refusal(error: ValidationError, where: str = "") -> ConfigError:
    """Its first fault: the place, the value and what is allowed."""
    wrong = error.errors()[0]
    place = ".".join(map(str, [*([where] if where else []), *wrong["loc"]]))
    message = wrong["msg"].removeprefix("Value error, ")
    if not isinstance(wrong["input"], dict | list):
        message += f", got {wrong['input']!r}"
    return ConfigError(f"{FILE}: {place}: {message}")
