"""AppArgs: the `args` of the application in a Serve config, and what they come to.

The only place that knows where a path in them starts and what the model is called by default.
Knows no Ray: the command line asks it before anything is started.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from serve_app.serve_config import DEPLOYMENT

BESIDE = Path(__file__).resolve().parent.parent  # the directory that holds this package


class ModelArgs(BaseModel):
    """What is said of one model."""

    model_config = ConfigDict(extra="forbid")

    engine: str | dict[str, Any]  # path of an engine config, or its settings
    model_name: str | None = None  # what clients call it; default: the checkpoint directory's name
    cpus_per_replica: float | None = Field(default=None, gt=0)
    cpus_per_rank: float | None = Field(default=None, gt=0)
    max_body_bytes: int | None = Field(default=None, ge=1024)  # default: follows the context
    max_sequences_per_request: int = Field(default=128, ge=1)  # prompts × n
    cache_aware_routing: bool = True  # among its replicas; False: each uses its own engine only

    def engine_config(self, **overrides: Any) -> EngineConfig:
        """The engine's settings with the checkpoint's absolute path: actors may start elsewhere.

        CheckpointError when there is no checkpoint, ConfigError when the settings cannot work.
        """
        if isinstance(self.engine, str):
            config = EngineConfig.from_yaml(_resolve(self.engine), **overrides)
        else:
            config = EngineConfig.from_dict(self.engine | overrides, "args.engine")
        return replace(config, model=str(_checkpoint(config.model)))

    def served_name(self, config: EngineConfig) -> str:
        return self.model_name or Path(config.model).name


class AppArgs(ModelArgs):
    """`args` of the application: those of its one model, or `models`, the first answering HTTP."""

    engine: str | dict[str, Any] = ""
    models: list[ModelArgs] = []

    @property
    def each(self) -> list[ModelArgs]:
        return self.models or [self]

    @model_validator(mode="after")
    def _one_form(self) -> "AppArgs":
        given = self.model_fields_set - {"models"}
        if self.models and given:
            raise ValueError(f"models: {min(given)} belongs into an entry of that list")
        if not self.models and "engine" not in given:
            raise ValueError(
                "engine must be the path of an engine config or a mapping, or models a list"
            )
        return self


def deployment_names(model_names: Sequence[str]) -> list[str]:
    """The Serve deployment of each model. ConfigError when two would have one name."""
    names = [DEPLOYMENT, *(re.sub(r"[^\w.-]", "-", name) for name in model_names[1:])]
    for index, name in enumerate(names):
        if name in names[:index] or model_names[index] in model_names[:index]:
            raise ConfigError(
                f"args.models: {model_names[index]!r} needs a model_name that no other model has"
            )
    return names


def _checkpoint(model: str) -> Path:
    path = _resolve(model)
    if not (path / "config.json").is_file():
        known = "it has no config.json" if path.is_dir() else "there is no such directory"
        raise CheckpointError(
            f"cannot serve {model!r}: {known}; give the directory of a Hugging Face "
            "checkpoint (`hf download ORG/NAME --local-dir DIR` fetches one)"
        )
    return path


def _resolve(path: str) -> Path:
    """Relative to the working directory, else to the directory that holds this package."""
    here = Path(path).expanduser().absolute()
    there = BESIDE / path
    return there if there.exists() and not here.exists() else here
