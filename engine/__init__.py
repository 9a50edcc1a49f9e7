"""Manta's engine: token ids in, token ids out, and `LLM` for offline use.

`LLM` loads on first use: torch takes a second to import, which the command line must not pay.
"""

from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import MantaError
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM, CompletionOutput, RequestOutput

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "MantaError",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "CompletionOutput", "RequestOutput"):
        from engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
