"""What generation_config.json says: default sampling values and the ids that end a text.

Plain JSON, no transformers. The engine never reads it; the text layer passes its values on.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

# Keys that become defaults of a request, as vLLM's `--generation-config auto` does.
_SAMPLING_KEYS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """`sampling` holds SamplingParams fields that apply where a request says nothing."""

    eos_token_ids: tuple[int, ...]
    sampling: Mapping[str, float]

    @classmethod
    def load(cls, path: Path) -> "GenerationConfig":
        """Read generation_config.json, or config.json's eos_token_id where there is none."""
        values = _read_json(path / "generation_config.json")
        if "eos_token_id" not in values:
            values["eos_token_id"] = _read_json(path / "config.json").get("eos_token_id")
        sampling = {
            ours: _number(path, theirs, values[theirs])
            for theirs, ours in _SAMPLING_KEYS.items()
            if values.get(theirs) is not None
        }
        if values.get("do_sample") is False:  # files that say so mean the likeliest token
            sampling["temperature"] = 0.0
        return cls(_token_ids(path, values["eos_token_id"]), sampling)


def _read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty when there is no such file."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"{path / 'generation_config.json'}: {key} must be a number, found {value!r}"
        )
    return value


def _token_ids(path: Path, value: Any) -> tuple[int, ...]:
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) for token_id in token_ids):
        raise CheckpointError(
            f"{path}: eos_token_id must be a token id or a list of them, found {value!r}"
        )
    return tuple(token_ids)
