"""The byte order and arithmetic of quantised keys and values, against their formulas."""

import pytest
import torch

from kernels.kv_layout import (
    dequantize_kv,
    join_nibbles,
    k_bytes,
    k_words,
    quantize_kv,
    split_nibbles,
    v_bytes,
    v_words,
)


def place(element: int) -> tuple[int, int]:
    """Word and byte of an element along its runs of 16."""
    run, inside = divmod(element, 16)
    half, rest = divmod(inside, 8)
    lane, pair = divmod(rest, 2)
    return 4 * run + lane, 2 * half + pair


def test_every_byte_is_where_the_layout_says() -> None:
    values = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    keys, tokens = k_words(values), v_words(values)
    for element in range(32):
        word, byte = place(element)
        assert torch.equal(keys[..., word] >> 8 * byte & 255, values[..., element].int())
        assert torch.equal(tokens[..., word, :] >> 8 * byte & 255, values[..., element, :].int())
    assert torch.equal(k_bytes(keys), values)
    assert torch.equal(v_bytes(tokens), values)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_nibbles(head_dim: int) -> None:
    values = torch.randint(0, 16, (5, head_dim), dtype=torch.uint8)
    packed = join_nibbles(values)
    assert packed.shape[-1] % 16 == 0
    assert torch.equal(split_nibbles(packed, head_dim), values)


@pytest.mark.parametrize(("policy", "steps"), [(8, 255), (4, 15)])
def test_values_are_off_by_half_a_step(policy: int, steps: int) -> None:
    x = torch.randn(100, 64) + 3
    u, params = quantize_kv(x, policy)
    step = (x.amax(-1) - x.amin(-1)) / steps
    error = (dequantize_kv(u, params, policy) - x).abs().amax(-1)
    # float16 rounds the scale (over all steps) and the zero, by 2^-11 each.
    slack = 2**-11 * (x.amax(-1) - x.amin(-1) + x.amin(-1).abs())
    assert (error <= step / 2 + slack).all()


def test_fp8_keeps_three_bits_of_mantissa() -> None:
    x = torch.randn(100, 64)
    u, params = quantize_kv(x, 16)
    small = x.abs().amax(-1, keepdim=True) * 2**-14
    assert ((dequantize_kv(u, params, 16) - x).abs() <= x.abs() * 2**-4 * 1.01 + small).all()


@pytest.mark.parametrize("policy", [4, 8, 16])
def test_equal_values_come_back(policy: int) -> None:
    x = torch.full((3, 64), 1.5)
    assert torch.allclose(dequantize_kv(*quantize_kv(x, policy), policy), x, rtol=2**-10)
