"""One decoder, many families: a checkpoint directory in, hidden states and logits out."""

from engine.models.config import load_spec, resolve_dtype
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.models.sharding import check_pp, check_tp, stage_layers
from engine.models.spec import DecoderSpec

__all__ = [
    "Decoder",
    "DecoderSpec",
    "check_pp",
    "check_tp",
    "load_decoder",
    "load_spec",
    "resolve_dtype",
    "stage_layers",
]
