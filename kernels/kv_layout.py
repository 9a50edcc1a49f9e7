"""How a layer's keys and values lie in their blocks, and the arithmetic of quantised ones.

Plain (quant_policy 0): one tensor [num_blocks, 2 * Hkv, block_size, D], keys' heads first
(kernels/attention.py).

Quantised: each token's D values of one head have a scale and a zero in float16,
x = u * scale + zero. Policy 8 and 4 are asymmetric: zero = min, scale = (max - min) / (2^bits - 1),
u = round((x - zero) / scale). Policy 16 is fp8 e4m3: scale = max |x| / 448, zero = 0. The numbers
of the policies are LMDeploy's.

The bytes lie as the lanes of a matrix unit hold an operand's fragment (16 x 8 tiles of
mma.m16n8k16: a lane has elements 2l, 2l + 1, 8 + 2l, 9 + 2l), so that a GPU dequantises in
registers. In every run of 16, element 8h + 2l + p is byte 2h + p of word l:

    keys    words [num_blocks, Hkv, block_size, F / 4]        runs along the head's features
    values  words [num_blocks, Hkv, block_size / 4, F]        runs along the tokens
    params  words [num_blocks, 2 * Hkv, block_size]           scale in the low half, zero high

with F = D for 8-bit values. 4-bit ones have two features per byte, d in the low and d + F in the
high nibble, F = D / 2 rounded up to a multiple of 16.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POLICY_NAMES = {0: "plain", 4: "int4", 8: "int8", 16: "fp8"}
POLICIES = tuple(POLICY_NAMES)
RUN = 16  # elements: what head dims and block sizes of quantised caches are multiples of
FP8_MAX = 448.0
_LEAST_SCALE = 2.0**-24  # the smallest float16 above 0


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """One layer's quantised cache."""

    k: Tensor  # int32 [num_blocks, Hkv, block_size, F / 4]
    v: Tensor  # int32 [num_blocks, Hkv, block_size / 4, F]
    params: Tensor  # int32 [num_blocks, 2 * Hkv, block_size]
    policy: int
    head_dim: int

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        policy: int,
        device: str,
    ) -> "QuantizedKV":
        """Zeroed: a slot that was never written gives zeros."""
        assert policy in POLICIES[1:]
        assert block_size % RUN == 0
        assert head_dim % RUN == 0
        features = features_per_token(head_dim, policy)
        lead = num_blocks, num_kv_heads
        return cls(
            k=lazy_zeros((*lead, block_size, features // 4), torch.int32, device),
            v=lazy_zeros((*lead, block_size // 4, features), torch.int32, device),
            params=lazy_zeros((num_blocks, 2 * num_kv_heads, block_size), torch.int32, device),
            policy=policy,
            head_dim=head_dim,
        )

    @property
    def num_blocks(self) -> int:
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.params.nbytes

    def store(self, kv: Tensor, slots: Tensor) -> None:
        """Quantise the keys and values of T tokens, kv [T, 2 * Hkv, D], into slots int64 [T]."""
        num_heads = self.num_kv_heads
        u, params = quantize_kv(kv, self.policy)
        values = join_nibbles(u) if self.policy == 4 else u
        keys, values = values[:, :num_heads], values[:, num_heads:]  # [T, Hkv, F]
        blocks = slots[:, None] // self.block_size
        offsets = slots[:, None] % self.block_size
        heads = torch.arange(2 * num_heads, device=slots.device)
        rows = (blocks * num_heads + heads[:num_heads]) * self.block_size + offsets
        self.k.view(-1, self.k.shape[3])[rows] = k_words(keys)
        # One byte of a word per token: its neighbours in time own the others.
        by_byte = self.v.view(torch.uint8).view(-1, values.shape[2], 4).transpose(1, 2)
        words, places = place_in_words(rows)
        by_byte[words, places] = values
        rows = (blocks * 2 * num_heads + heads) * self.block_size + offsets
        self.params.view(-1)[rows] = params.contiguous().view(torch.int32).squeeze(-1)

    def gather(self, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """blocks int64 [R, B] -> keys and values [R, Hkv, B * block_size, D], dequantised."""
        heads = torch.arange(2 * self.num_kv_heads, device=blocks.device)[:, None]
        rows = blocks[:, None] * self.num_kv_heads + heads[: self.num_kv_heads]
        keys = k_bytes(self.k.flatten(0, 1)[rows]).flatten(2, 3)
        values = v_bytes(self.v.flatten(0, 1)[rows]).flatten(2, 3)
        rows = blocks[:, None] * 2 * self.num_kv_heads + heads
        params = self.params.flatten(0, 1)[rows].flatten(2).unsqueeze(-1).view(torch.float16)
        key_params, value_params = params.split_with_sizes((self.num_kv_heads,) * 2, dim=1)
        return (
            self._dequantize(keys, key_params).to(dtype),
            self._dequantize(values, value_params).to(dtype),
        )

    def _dequantize(self, values: Tensor, params: Tensor) -> Tensor:
        u = split_nibbles(values, self.head_dim) if self.policy == 4 else values
        return dequantize_kv(u, params, self.policy)


LayerCache = Tensor | QuantizedKV


def policy_of(name: str) -> int:
    """Of one of POLICY_NAMES; any other, such as a data type's, is a plain cache's."""
    return next((policy for policy, each in POLICY_NAMES.items() if each == name), 0)


def heads_of(cache: LayerCache) -> tuple[int, int]:
    """Hkv and D."""
    if isinstance(cache, QuantizedKV):
        return cache.num_kv_heads, cache.head_dim
    return cache.shape[1] // 2, cache.shape[3]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros whose memory is not touched yet, on a CPU.

    calloc: pages become resident when a block is first used. torch.zeros writes them all at
    once: for a 2 GiB cache 1 to 5 s (2 cores), and the memory even while nothing runs.
    """
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def bytes_per_token(head_dim: int, policy: int) -> int:
    """Of one head's key and value, with their scales and zeros."""
    return 2 * (features_per_token(head_dim, policy) + 4)


def features_per_token(head_dim: int, policy: int) -> int:
    """F: bytes that a token's keys (or values) of one head take."""
    if policy != 4:
        return head_dim
    return -(-head_dim // (2 * RUN)) * RUN


def quantize_kv(x: Tensor, policy: int) -> tuple[Tensor, Tensor]:
    """x [..., D] -> u uint8 [..., D] (policy 16: the bits of e4m3) and params float16 [..., 2]."""
    x = x.float()
    if policy == 16:
        zero = torch.zeros_like(x[..., 0])
        scale = (x.abs().amax(-1) / FP8_MAX).half().clamp_(min=_LEAST_SCALE)
        scaled = (x / scale.float()[..., None]).clamp_(-FP8_MAX, FP8_MAX)
        scaled.nan_to_num_()  # shows in the scale alone (kernels/gpu/kv_quantize.py)
        u = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return u, torch.stack((scale, zero.half()), -1)
    largest = 2**policy - 1
    zero = x.amin(-1).half()
    scale = ((x.amax(-1) - zero.float()) / largest).half().clamp_(min=_LEAST_SCALE)
    u = ((x - zero.float()[..., None]) / scale.float()[..., None]).round_().clamp_(0, largest)
    return u.to(torch.uint8), torch.stack((scale, zero), -1)


def dequantize_kv(u: Tensor, params: Tensor, policy: int) -> Tensor:
    """float32 [..., D]."""
    values = u.view(torch.float8_e4m3fn).float() if policy == 16 else u.float()
    scale, zero = params.float().unbind(-1)
    return values.mul_(scale[..., None]).add_(zero[..., None])


def join_nibbles(u: Tensor) -> Tensor:
    """4-bit values [..., D] -> bytes [..., F]."""
    half = features_per_token(u.shape[-1], 4)
    u = torch.nn.functional.pad(u, (0, 2 * half - u.shape[-1]))
    return u[..., :half] | u[..., half:] << 4


def split_nibbles(packed: Tensor, head_dim: int) -> Tensor:
    """Bytes [..., F] -> 4-bit values [..., D]."""
    return torch.cat((packed & 15, packed >> 4), -1)[..., :head_dim]


def k_words(values: Tensor) -> Tensor:
    """Bytes [..., tokens, F] -> words int32 [..., tokens, F / 4]."""
    *lead, f = values.shape
    runs = values.reshape(*lead, f // 16, 2, 4, 2).transpose(-3, -2)  # run, lane, half, pair
    return runs.reshape(*lead, f // 4, 4).view(torch.int32).squeeze(-1)


def k_bytes(words: Tensor) -> Tensor:
    """What `k_words` took."""
    *lead, num_words = words.shape
    # Pairs at a time: a third of the time of single bytes.
    runs = words.contiguous().view(torch.int16).view(*lead, num_words // 4, 4, 2)
    return runs.transpose(-2, -1).contiguous().view(torch.uint8).view(*lead, num_words * 4)


def place_in_words(elements: Tensor) -> tuple[Tensor, Tensor]:
    """The words and the bytes in them where elements of a run of runs lie; int64 all."""
    words = elements // RUN * 4 + elements % 8 // 2
    return words, elements // 8 % 2 * 2 + elements % 2


def v_words(values: Tensor) -> Tensor:
    """Bytes [..., tokens, F] -> words int32 [..., tokens / 4, F]."""
    *lead, tokens, f = values.shape
    runs = values.reshape(*lead, tokens // 16, 2, 4, 2, f)  # run, half, lane, pair, feature
    runs = runs.movedim((-4, -2), (-2, -1))  # run, lane, feature, half, pair
    return runs.reshape(*lead, tokens // 4, f, 4).view(torch.int32).squeeze(-1)


def v_bytes(words: Tensor) -> Tensor:
    """What `v_words` took."""
    *lead, rows, f = words.shape
    runs = words.contiguous().view(torch.uint8).view(*lead, rows // 4, 4, f, 2, 2)
    runs = runs.movedim((-2, -1), (-4, -2))  # run, half, lane, pair, feature
    return runs.reshape(*lead, rows * 4, f)
