"""ModelSpec: one of the models behind the address, as the application's args describe it."""

from dataclasses import dataclass

from engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_bytes: int | None  # None: what the context can need
    max_sequences: int  # prompts × n of one request


@dataclass(frozen=True, slots=True)
class Context:
    """What a checkpoint says of its engines; those may have a shorter session_len."""

    session_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    name: str
    config: EngineConfig
    limits: Limits
    cache_aware_routing: bool = True
