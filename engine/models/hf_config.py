"""A checkpoint's JSON files as typed reads: a missing or wrong value is refused by its key.

Plain JSON on purpose: importing transformers to parse a config costs an actor about 3 s.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


class HFConfig:
    """Typed access to the keys of one JSON object; `source` names it in errors.

    A key that is null counts as absent: it takes the default, or is refused without one.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, value, f"an integer of at least {minimum}")
        return value

    def integer_or_null(self, key: str, default: int) -> int | None:
        """Here null is a value of its own; only an absent key takes the default."""
        if key in self.values and self.values[key] is None:
            return None
        return self.integer(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self._get(key, default)
        if value not in allowed:
            raise self.error(key, value, f"one of {', '.join(allowed)}")
        return str(value)

    def section(self, key: str) -> "HFConfig":
        """A nested object; an absent one reads as empty."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return HFConfig(value, f"{self.source}: {key}")

    def error(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} must be {allowed}, got {value!r}")

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: the key {key!r} is missing")
        return value
