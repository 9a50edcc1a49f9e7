"""AppArgs: the `args` of the application in a Serve config, and what they come to.

The only place that knows where a path in them starts and what the model is called by default.
Knows no Ray: the command line asks it before anything is started.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engine.config import EngineConfig
from engine.errors import CheckpointError

BESIDE = Path(__file__).resolve().parent.parent  # the directory that holds this package


class AppArgs(BaseModel):
    """`args` of the application."""

    model_config = ConfigDict(extra="forbid")

    engine: str | dict[str, Any]  # path of an engine config, or its settings
    model_name: str | None = None  # what clients call it; default: the checkpoint directory's name
    cpus_per_replica: float | None = Field(default=None, gt=0)
    cpus_per_rank: float | None = Field(default=None, gt=0)
    max_body_bytes: int | None = Field(default=None, ge=1024)  # default: follows the context
    max_sequences_per_request: int = Field(default=128, ge=1)  # prompts × n

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
