"""What quantised keys and values cost: one model with each quant_policy beside the plain cache.

The arithmetic is the cache's own (kernels/kv_layout.py): every key and value is read back as the
cache would give it, its own step's too. Nothing is calibrated.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.kv_cache import bytes_per_block, check_head_dim
from engine.models import load_spec
from engine.quantize.calibration import HeldOut
from engine.quantize.comparison import Evaluation
from engine.quantize.evaluation import Lane, Progress, compare, open_model
from kernels.kv_layout import POLICIES

QUANTIZED = tuple(policy for policy in POLICIES if policy)


def kv_loss(
    path: Path,
    policies: Sequence[int],
    samples: HeldOut,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[int, Evaluation]:
    """By quant_policy, on held-out tokens; the reference is the plain cache."""
    spec = load_spec(path)
    for policy in policies:
        if policy not in QUANTIZED:
            raise ConfigError(
                f"quant_policy must be one of {', '.join(map(str, QUANTIZED))} to have a loss, "
                f"got {policy}"
            )
        check_head_dim(spec, policy)
    with open_model(path, dtype, device) as model:
        lanes = [Lane(model, policy) for policy in (0, *policies)]
        found = compare(lanes, samples, batch_size, progress)
    return dict(zip(policies, found, strict=True))


def bytes_per_token(path: Path, policies: Sequence[int]) -> Mapping[int, int]:
    """By quant_policy: bytes that a token's keys and values take in all layers; 0 is bf16's."""
    spec = load_spec(path)
    return {
        policy: bytes_per_block(spec, 1, torch.bfloat16, 1, quant_policy=policy)
        for policy in policies
    }
