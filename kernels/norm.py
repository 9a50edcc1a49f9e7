"""RMSNorm, alone and fused with the residual addition before it.

y = x / sqrt(mean(x^2) + eps) * weight over the last axis. The mean and the division are float32;
the normalised row is rounded to x's dtype before it is multiplied by the weight, the order of
Llama's reference code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import check_dense, library_for
from kernels.gpu import on_gpu
from kernels.partials import Partials, summed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H], weight [H] -> [T, H] in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=eps).mul_(weight)


def head_rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    """x [T, heads, D] in place, weight [heads, D]: every head by itself."""
    native = library_for(x)
    if native is None:
        x.copy_(rms_norm(x, weight, eps))
        return
    tokens, heads, size = x.shape
    assert x.stride(1) == size
    check_dense(weight, (heads, size))
    native.manta_rms_norm_heads(
        x.data_ptr(), weight.data_ptr(), tokens, heads, size, x.stride(0), eps,
        torch.get_num_threads(),
    )  # fmt: skip


def add_rms_norm(
    x: Tensor | Partials, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, H]; without a residual x is the sum."""
    if on_gpu(weight):
        from kernels.gpu.norm import add_rms_norm as add_rms_norm_on_gpu

        return add_rms_norm_on_gpu(x, residual, weight, eps)
    x = summed(x)
    native = library_for(x)
    if native is None:
        residual = x if residual is None else x + residual
        return rms_norm(residual, weight, eps), residual
    residual = torch.zeros_like(x) if residual is None else residual
    assert x.is_contiguous()
    check_dense(residual, x.shape)
    check_dense(weight, x.shape[1:])
    total, normed = torch.empty_like(x), torch.empty_like(x)
    native.manta_add_rms_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), total.data_ptr(),
        normed.data_ptr(), *x.shape, eps, torch.get_num_threads(),
    )  # fmt: skip
    return normed, total
