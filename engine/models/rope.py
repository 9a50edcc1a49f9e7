"""Rotary frequencies: one frozen class per `rope_type`, its formula beside its parameters.

Each class gives `inv_freq(dim, session_len)`, float32 [dim/2], and `attention_factor`, by which
cos and sin are multiplied. The operations and their order are those of the papers' reference
implementations as transformers has them, so that float32 tables come out equal bit by bit.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rope(Protocol):
    """How positions turn into angles; `session_len` is the longest sequence to be served."""

    @property
    def attention_factor(self) -> float: ...

    def inv_freq(self, dim: int, session_len: int) -> Tensor: ...


def inverse_powers(theta: float, dim: int) -> Tensor:
    """theta^(-2i/dim) for i < dim/2 (RoFormer, arXiv 2104.09864)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultRope:
    theta: float
    attention_factor: float = 1.0

    def inv_freq(self, dim: int, session_len: int) -> Tensor:
        return inverse_powers(self.theta, dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope:
    """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""

    theta: float
    factor: float
    attention_factor: float = 1.0

    def inv_freq(self, dim: int, session_len: int) -> Tensor:
        return inverse_powers(self.theta, dim) / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRope:
    """Dynamic NTK: the base grows with the sequence once that is longer than the training.

    Keys stay in the cache as they were rotated and are shared between sequences, so one base
    must serve every sequence and every step: it is the one transformers uses for a sequence of
    `session_len` tokens. Up to `max_position_embeddings` that is the trained base, and results
    equal transformers for every sequence. A longer `session_len` gives short sequences the
    stretched base too; transformers would change base as a sequence grows and keep keys of
    different bases in one cache, which no cache shared between sequences can follow.
    """

    theta: float
    factor: float
    max_position_embeddings: int
    attention_factor: float = 1.0

    def inv_freq(self, dim: int, session_len: int) -> Tensor:
        length = max(session_len, self.max_position_embeddings)
        growth = self.factor * length / self.max_position_embeddings - (self.factor - 1)
        return inverse_powers(self.theta * growth ** (dim / (dim - 2)), dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1: wavelengths beyond the trained context are stretched, short ones kept."""

    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0

    def inv_freq(self, dim: int, session_len: int) -> Tensor:
        inv_freq = inverse_powers(self.theta, dim)
        trained = self.original_max_position_embeddings
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / inv_freq
        smooth = (trained / wavelength - low) / (high - low)
        blended = (1 - smooth) * inv_freq / self.factor + smooth * inv_freq
        stretched = torch.where(wavelength > trained / low, inv_freq / self.factor, blended)
        return torch.where(wavelength < trained / high, inv_freq, stretched)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, ramp between."""

    theta: float
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def inv_freq(self, dim: int, session_len: int) -> Tensor:
        powers = self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        low, high = self._rotation_dim(self.beta_fast, dim), self._rotation_dim(self.beta_slow, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001  # the reference's guard against 0 / 0
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept

    def _rotation_dim(self, rotations: float, dim: int) -> float:
        """The dimension that turns `rotations` times within the trained context."""
        turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(self.theta))


def rotary_table(
    rope: Rope, dim: int, session_len: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each [session_len, dim], the dim/2 angles repeated twice."""
    positions = torch.arange(session_len, dtype=torch.float32)
    angles = torch.outer(positions, rope.inv_freq(dim, session_len))
    angles = torch.cat((angles, angles), dim=1)
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    return cos.to(device, dtype), sin.to(device, dtype)
