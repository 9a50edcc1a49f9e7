"""Error feedback: change a weight input by input, and let the inputs to come make up for it.

The loop of GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774). What a changed input does to
the outputs is taken back, as well as the Gram matrix H allows, by the inputs after it: their
share is a row of U, the upper Cholesky factor of H⁻¹.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import CheckpointError

logger = logging.getLogger(__name__)

# Inputs whose effect on all later ones is added at once, as a product.
BLOCK = 128
MAX_DAMPING = 10.0


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U [K, K], float32, with UᵀU = (H + damping * mean(diag H) * I)⁻¹.

    Inputs that were never seen are given H's mean on the diagonal, so that they are rounded by
    themselves. When H is not positive definite in float32 float64 is tried, then more damping.
    """
    mean = gram.diagonal().mean().clamp(min=1e-30)
    diagonal = gram.diagonal()
    lift = torch.where(diagonal > 0, torch.zeros_like(diagonal), mean)
    while damping <= MAX_DAMPING:
        for dtype in (torch.float32, torch.float64):
            upper = _factor(gram.to(dtype) + torch.diag(lift + damping * mean).to(dtype))
            if upper is not None:
                return upper.float()
        raised = max(10 * damping, 1e-4)
        logger.warning(
            "the Gram matrix of %d inputs is not positive definite with damping %g: trying %g",
            gram.shape[0],
            damping,
            raised,
        )
        damping = raised
    raise CheckpointError(
        f"the Gram matrix of {gram.shape[0]} inputs is not positive definite with a damping of "
        f"{MAX_DAMPING:g} of its mean; calibrate on more text, or use awq or rtn, which invert none"
    )


def feed_back(
    columns: Tensor, upper: Tensor, changed: Callable[[int], Tensor], block: int = BLOCK
) -> None:
    """Replace each input's weights, columns[k] [N] of [K, N], by what `changed` makes of it.

    `changed(k)` is asked once for every k, in order. It may look at columns[k:], which are up to
    date as far as the end of k's block and lack the block's own errors beyond it.
    """
    diagonal = upper.diagonal().tolist()
    for start in range(0, len(diagonal), block):
        stop = min(start + block, len(diagonal))
        errors = torch.empty_like(columns[start:stop])
        for k in range(start, stop):
            value = changed(k)
            error = errors[k - start]
            torch.sub(columns[k], value, out=error)
            error.div_(diagonal[k])
            columns[k] = value
            columns[k + 1 : stop].addr_(upper[k, k + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)


def _factor(hessian: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper
