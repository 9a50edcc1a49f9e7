"""Which serve_config.yaml `manta serve` starts from, read and checked as far as needs no Ray.

What Ray alone knows (the type of each of its keys) is checked in serve_schema, a second later.
"""

import difflib
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
FILE = "serve_config.yaml"
IMPORT_PATH = "serve_app.app:build_app"
DEPLOYMENT = "LLMReplica"  # of the first model, which answers HTTP
POLICY = "serve_app.autoscaling:QueueDepthPolicy"
SECTIONS = {"http_options": dict, "logging_config": dict, "args": dict, "deployments": list}


def read_serve_config() -> tuple[Path, dict[str, Any]]:
    """The file here, else the repository's, else the installed package's copy; its content.

    A file that deploys other applications is passed over, and said so. The one application has a
    name, and every section is there. ConfigError names what is wrong.
    """
    places = [Path.cwd(), PACKAGE.parent, PACKAGE]
    for path in (place / FILE for place in places if (place / FILE).is_file()):
        config = _load(path)
        if (others := _other_applications(config)) is None:
            return path, _checked(config, path)
        print(
            f"manta: {path} deploys {', '.join(others)} and is not used; Manta's application has "
            f"import_path {IMPORT_PATH}",
            file=sys.stderr,
        )
    raise ConfigError(f"no {FILE} of Manta in {', '.join(map(str, places))}")


def nearest(key: object, known: Iterable[str]) -> str:
    """A hint for an unknown key."""
    known = sorted(known)
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _load(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must be a mapping with `applications`, got {config!r}")
    return config


def _other_applications(config: dict[str, Any]) -> list[str] | None:
    """The import paths of a file that has nothing to do with Manta, None when it has."""
    apps = config.get("applications")
    if not isinstance(apps, list) or not all(isinstance(app, dict) for app in apps):
        return None
    paths = [str(app.get("import_path")) for app in apps]
    return None if IMPORT_PATH in paths or not paths else paths


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    apps = config.get("applications")
    if not isinstance(apps, list) or len(apps) != 1 or not isinstance(apps[0], dict):
        raise ConfigError(
            f"{path}: `applications` must be a list of one mapping, got {apps!r}; several "
            "applications are deployed with `serve run`"
        )
    (app,) = apps
    app.setdefault("name", "default")  # Serve's own
    _fill(config, ("http_options", "logging_config"), path)
    _fill(app, ("args", "deployments"), path)
    app["deployments"] = app["deployments"] or [{"name": DEPLOYMENT}]
    _check_listen(config["http_options"], path)
    return config


def check_deployments(app: dict[str, Any], known: Collection[str], path: Path) -> None:
    """ConfigError for an entry of `deployments` that the application does not have."""
    for each in app["deployments"]:
        name = each.get("name") if isinstance(each, dict) else each
        if not isinstance(name, str) or name not in known:
            raise ConfigError(
                f"{path}: the application has no deployment {name!r}; {nearest(name, known)}"
            )


def _fill(mapping: dict[str, Any], sections: Iterable[str], path: Path) -> None:
    """A section that is absent or left empty gets its empty value."""
    for name in sections:
        kind = SECTIONS[name]
        if mapping.get(name) is None:
            mapping[name] = kind()
        elif not isinstance(mapping[name], kind):
            what = "a mapping" if kind is dict else "a list"
            raise ConfigError(f"{path}: `{name}` must be {what}, got {mapping[name]!r}")


def _check_listen(http: dict[str, Any], path: Path) -> None:
    http.setdefault("host", "127.0.0.1")
    http.setdefault("port", 8000)
    if not isinstance(http["host"], str):
        raise ConfigError(f"{path}: http_options.host must be an address, got {http['host']!r}")
    port = http["port"]
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
        raise ConfigError(f"{path}: http_options.port must be between 0 and 65535, got {port!r}")
