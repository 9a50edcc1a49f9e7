"""What a replica reads of a model's checkpoint, which may lie on another node. Not for the loop."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from serve_app.model_spec import Context

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer
    from engine.weights.origin import Origin


def load_tokenizer(config: EngineConfig) -> "Tokenizer":
    """Takes seconds."""
    from engine.tokenizer import Tokenizer

    return Tokenizer.load(_origin(config).settings)


def read_context(config: EngineConfig) -> Context:
    from engine.models import load_spec

    spec = load_spec(_origin(config).settings)
    longest = spec.max_position_embeddings
    return Context(min(config.session_len or longest, longest), spec.vocab_size)


def version_of(config: EngineConfig) -> str:
    """What decides an engine's answers: only engines of one version stand in for each other."""
    origin = _origin(config)
    architecture = (origin.settings / "config.json").read_text()
    parts = json.dumps([config.to_dict(), origin.weights_id, architecture])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _origin(config: EngineConfig) -> "Origin":
    from engine.ray_weights import RayPeers
    from engine.weights.origin import Origin

    checkpoint, peers = Path(config.model), RayPeers.of(config)
    return Origin.at(checkpoint) if peers is None else peers.origin(checkpoint)
