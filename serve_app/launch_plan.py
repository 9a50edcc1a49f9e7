"""LaunchPlan: the command line, serve_config.yaml and an engine config made into one, and checked.

Everything that can be wrong without Ray or torch is refused here, in the first half second.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from serve_app.ports import free_ports

PACKAGE = Path(__file__).resolve().parent
DEPLOYMENT = "LLMReplica"  # the deployment build_app makes; num_replicas belongs to it


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What to deploy, and where it will be reached."""

    serve_config: dict[str, Any]  # a ServeDeploySchema
    engine: EngineConfig
    model_name: str
    num_replicas: int
    host: str
    port: int

    @property
    def app_name(self) -> str:
        return str(self.serve_config["applications"][0]["name"])

    @property
    def num_ranks(self) -> int:
        return self.num_replicas * self.engine.tp


def make_plan(
    *,
    model: str | None = None,
    engine_config: Path | None = None,
    model_name: str | None = None,
    host: str | None = None,
    port: int | None = None,
    num_replicas: int | None = None,
    log_level: str | None = None,
    **engine: Any,
) -> LaunchPlan:
    """serve_config.yaml with everything that is not None put over it.

    `engine` are fields of EngineConfig. A given model without an engine config takes
    EngineConfig's defaults, not the demo's numbers. ConfigError or CheckpointError says what
    cannot work.
    """
    path = find_serve_config()
    config = _read_serve_config(path)
    app = config["applications"][0]
    args = app.setdefault("args", {})
    http = config.setdefault("http_options", {})
    overrides = {key: value for key, value in engine.items() if value is not None}
    settings = _engine_settings(args, path, model, engine_config, overrides)
    own_name = None if model or engine_config else args.get("model_name")
    args["model_name"] = model_name or own_name or Path(settings.model).name
    args["engine"] = settings.to_dict()
    http["host"] = host or http.get("host", "127.0.0.1")
    http["port"] = http.get("port", 8000) if port is None else port
    if http["port"] == 0:
        http["port"] = free_ports(1)[0]
    if num_replicas is not None:
        _deployment(app)["num_replicas"] = num_replicas
    if log_level is not None:
        config.setdefault("logging_config", {}).update(
            log_level=log_level.upper(), enable_access_log=log_level in ("debug", "info")
        )
    return LaunchPlan(
        serve_config=config,
        engine=settings,
        model_name=args["model_name"],
        num_replicas=_num_replicas(app),
        host=http["host"],
        port=http["port"],
    )


def find_serve_config() -> Path:
    """serve_config.yaml here, else the repository's, else the installed package's copy."""
    places = [Path.cwd(), PACKAGE.parent, PACKAGE]
    for place in places:
        if (place / "serve_config.yaml").is_file():
            return place / "serve_config.yaml"
    raise ConfigError(f"no serve_config.yaml in {', '.join(map(str, places))}")


def default_model() -> str:
    """The checkpoint serve_config.yaml names: the demo model."""
    return make_plan().engine.model


def _read_serve_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    apps = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(apps, list) or len(apps) != 1:
        raise ConfigError(
            f"{path}: `manta serve` starts exactly one application, got {apps!r}; "
            "deploy several with `serve run`"
        )
    return copy.deepcopy(config)


def _engine_settings(
    args: dict[str, Any],
    path: Path,
    model: str | None,
    engine_config: Path | None,
    overrides: dict[str, Any],
) -> EngineConfig:
    """Of the given engine config, or the given model alone, or what serve_config.yaml names."""
    base = PACKAGE.parent if path.parent == PACKAGE else path.parent
    if model is not None:
        overrides = overrides | {"model": model}
    if engine_config is not None:
        settings = EngineConfig.from_yaml(engine_config, **overrides)
    elif model is not None:
        settings = EngineConfig.from_dict(overrides)
    elif isinstance(args.get("engine"), str):
        settings = EngineConfig.from_yaml(_resolve(args["engine"], base), **overrides)
    elif isinstance(args.get("engine"), dict):
        settings = EngineConfig.from_dict(args["engine"] | overrides, str(path))
    else:
        raise ConfigError(
            f"{path}: args.engine must be a path or a mapping, got {args.get('engine')!r}"
        )
    return _checked_model(settings, base)


def _checked_model(settings: EngineConfig, base: Path) -> EngineConfig:
    """With the checkpoint's absolute path: actors may start in another directory."""
    path = _resolve(settings.model, base)
    if not (path / "config.json").is_file():
        known = "it has no config.json" if path.is_dir() else "there is no such directory"
        raise CheckpointError(
            f"cannot serve {settings.model!r}: {known}; give the directory of a Hugging Face "
            "checkpoint (`hf download ORG/NAME --local-dir DIR` fetches one)"
        )
    return EngineConfig.from_dict(settings.to_dict() | {"model": str(path)})


def _resolve(path: str, base: Path) -> Path:
    """Relative to the working directory, else to where serve_config.yaml lies."""
    here = Path(path).expanduser().absolute()
    return here if here.exists() else base / path


def _deployment(app: dict[str, Any]) -> dict[str, Any]:
    """The entry of the engine's deployment in an application's `deployments`."""
    deployments: list[dict[str, Any]] = app.setdefault("deployments", [])
    for each in deployments:
        if each.get("name") == DEPLOYMENT:
            return each
    deployments.append({"name": DEPLOYMENT})
    return deployments[-1]


def _num_replicas(app: dict[str, Any]) -> int:
    """How many start at once; with "auto" or none given, Serve starts one."""
    for each in app.get("deployments", []):
        if each.get("name") == DEPLOYMENT and isinstance(each.get("num_replicas"), int):
            return int(each["num_replicas"])
    return 1
