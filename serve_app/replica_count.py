"""How many replicas a deployment of a Serve config has: a fixed number, or what the queue asks for.

Knows the file's entry of one deployment, and no Ray.
"""

from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from serve_app.serve_config import POLICY

# What --max-replicas scales with where the file does not; the example in serve_config.yaml.
AUTOSCALING: dict[str, Any] = {
    "min_replicas": 1,
    "metrics_interval_s": 0.2,
    "look_back_period_s": 0.5,
    "upscale_delay_s": 0,
    "downscale_delay_s": 30,
    "downscale_to_zero_delay_s": 300,
    "policy": {"policy_function": POLICY},
}


def set_replicas(
    deployment: dict[str, Any],
    path: Path,
    *,
    fixed: int | None,
    least: int | None,
    most: int | None,
) -> None:
    """Put --num-replicas, or --min-replicas and --max-replicas, over the file's entry.

    ConfigError when they contradict each other or the file.
    """
    scaling = deployment.get("autoscaling_config")
    if fixed is not None:
        _check_fixed(fixed, least, most, scaling, path)
        deployment["num_replicas"] = fixed
    if least is None and most is None:
        return
    if most is None and not isinstance(scaling, dict):
        raise ConfigError(
            f"--min-replicas {least} needs --max-replicas: {path} has a fixed number of replicas"
        )
    scaling = dict(scaling if isinstance(scaling, dict) else AUTOSCALING)
    if most is not None:
        scaling["max_replicas"] = most
    if least is not None:
        scaling["min_replicas"] = least
    least, most = scaling.get("min_replicas", 1), scaling.get("max_replicas", 1)
    if least > most:
        raise ConfigError(
            f"--min-replicas is {least} and --max-replicas is {most}; raise the latter"
        )
    # One at the start in any case: whether the model loads is known before a client asks.
    scaling["initial_replicas"] = min(most, max(scaling.get("initial_replicas") or 1, least))
    deployment["autoscaling_config"] = scaling
    deployment.pop("num_replicas", None)


def max_replicas(deployment: dict[str, Any]) -> int:
    """How many there are at most; "auto" alone has no bound of ours and counts as one."""
    scaling = deployment.get("autoscaling_config")
    number = deployment.get("num_replicas")
    if isinstance(scaling, dict):
        number = scaling.get("max_replicas", 1)
    return number if isinstance(number, int) else 1


def _check_fixed(
    fixed: int, least: int | None, most: int | None, scaling: object, path: Path
) -> None:
    if least is not None or most is not None:
        name, number = ("--max-replicas", most) if least is None else ("--min-replicas", least)
        raise ConfigError(
            f"--num-replicas {fixed} fixes the number of replicas and {name} {number} scales it; "
            "give one of them"
        )
    if scaling is not None:
        raise ConfigError(
            f"--num-replicas {fixed} fixes the number of replicas, which autoscaling_config in "
            f"{path} scales; give --min-replicas and --max-replicas, or take it out"
        )
