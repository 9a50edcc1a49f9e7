"""RMSNorm, alone and fused with the residual addition before it.

y = x / sqrt(mean(x^2) + eps) * weight over the last axis. The mean and the division are float32;
the normalised row is rounded to x's dtype before it is multiplied by the weight, the order of
Llama's reference code.
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] or one row per head [heads, H] -> [..., H] in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=eps).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [..., H]."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual
