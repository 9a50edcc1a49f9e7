"""Random int4 weights for the stages, made on the device."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

NIBBLE_DEVIATION = 4.6  # of uniform 0 … 15


def random_int4(
    n: int, k: int, group_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N], and float32 [N, K], what they mean.

    Unit variance in gives unit variance out.
    """
    groups = k // group_size
    q = torch.randint(0, 16, (k, n), device=device, dtype=torch.uint8)
    zeros = torch.randint(6, 10, (groups, n), device=device, dtype=torch.uint8)
    spread = torch.rand(groups, n, device=device) + 0.5
    scales = (spread / (NIBBLE_DEVIATION * k**0.5)).to(dtype)
    centred = q.view(groups, group_size, n).float() - zeros.float().unsqueeze(1)
    weight = (centred * scales.float().unsqueeze(1)).view(k, n)
    return q, zeros, scales, weight.t().contiguous()


def copies_of(value: Any, count: int) -> list[Any]:
    """Dataclasses of tensors with memory of their own."""
    if isinstance(value, Tensor):
        return [value, *[value.clone() for _ in range(count - 1)]]
    if not dataclasses.is_dataclass(value):
        return [value] * count
    fields = {f.name: copies_of(getattr(value, f.name), count) for f in dataclasses.fields(value)}
    return [
        dataclasses.replace(value, **{name: each[i] for name, each in fields.items()})  # type: ignore[type-var]
        for i in range(count)
    ]
