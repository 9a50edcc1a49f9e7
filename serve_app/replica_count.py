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
    "downscale_delay_s": 60,
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
    options = {"min_replicas": least, "max_replicas": most}
    given = {key: value for key, value in options.items() if value is not None}
    if fixed is not None:
        _check_fixed(fixed, given, scaling, path)
        deployment["num_replicas"] = fixed
        return
    if not isinstance(scaling, dict):
        if not given:
            return
        if most is None:
            raise ConfigError(
                f"--min-replicas {least} needs --max-replicas: {path} has a fixed number of them"
            )
        scaling = AUTOSCALING
        deployment.pop("num_replicas", None)
    deployment["autoscaling_config"] = scaling | _bounds(scaling, given)


def max_replicas(deployment: dict[str, Any]) -> int:
    """How many there are at most; "auto" alone has no bound of ours and counts as one."""
    scaling = deployment.get("autoscaling_config")
    number = deployment.get("num_replicas")
    if isinstance(scaling, dict):
        number = scaling.get("max_replicas", 1)
    return number if isinstance(number, int) else 1


def _check_fixed(fixed: int, given: dict[str, int], scaling: object, path: Path) -> None:
    for key, number in given.items():
        raise ConfigError(
            f"--num-replicas {fixed} fixes the number of replicas and --{key.replace('_', '-')} "
            f"{number} scales it; give one of them"
        )
    if scaling is not None:
        raise ConfigError(
            f"--num-replicas {fixed} fixes the number of replicas, which autoscaling_config in "
            f"{path} scales; give --min-replicas and --max-replicas, or take it out"
        )


def _bounds(scaling: dict[str, Any], given: dict[str, int]) -> dict[str, Any]:
    """`given` are the options; what the file alone has wrong is refused with the rest of it."""
    bounds = {"min_replicas": 1, "max_replicas": 1, "initial_replicas": None} | scaling | given
    least, most = bounds["min_replicas"], bounds["max_replicas"]
    if not isinstance(least, int) or not isinstance(most, int):
        return given
    if least > most and given:
        raise ConfigError(
            f"--min-replicas is {least} and --max-replicas is {most}; raise the latter"
        )
    # One at the start, also where none is needed: whether the model loads is known at once.
    initial = bounds["initial_replicas"] or max(least, 1)
    if given and isinstance(initial, int):
        initial = min(most, max(initial, least))
    return given | {"initial_replicas": initial}
