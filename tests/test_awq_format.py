"""The AWQ layout: packing against a bit-by-bit reference, and what the values mean."""

import pytest
import torch
from torch import Tensor

from engine.weights.awq import pack_awq, unpack_awq
from engine.weights.matrix import Int4Matrix

GROUP = 32


def random_nibbles(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)


def reference_words(values: Tensor) -> list[list[int]]:
    """AutoAWQ's packing, one bit at a time, as signed 32-bit integers."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = []
    for row in values.tolist():
        packed = []
        for column in range(0, len(row), 8):
            bits = 0
            for nibble in range(8):
                for bit in range(4):
                    if row[column + order[nibble]] >> bit & 1:
                        bits |= 1 << (4 * nibble + bit)
            packed.append(bits - (1 << 32) if bits >= 1 << 31 else bits)
        words.append(packed)
    return words


def test_packing_matches_the_bitwise_reference() -> None:
    q, zeros = random_nibbles(64, 48), random_nibbles(2, 48, seed=1)
    qweight, qzeros = pack_awq(q, zeros)
    assert qweight.dtype == qzeros.dtype == torch.int32
    assert qweight.tolist() == reference_words(q)
    assert qzeros.tolist() == reference_words(zeros)


def test_one_word_by_hand() -> None:
    # Columns 0..7 hold 0..7; nibbles from the lowest are columns 0, 2, 4, 6, 1, 3, 5, 7.
    values = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    qweight, _ = pack_awq(values, values)
    assert qweight.item() == 0x75316420


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (32, 64), (96, 8), (256, 768)])
def test_round_trip(rows: int, columns: int) -> None:
    q, zeros = random_nibbles(rows, columns), random_nibbles(rows, columns, seed=1)
    unpacked_q, unpacked_zeros = unpack_awq(*pack_awq(q, zeros))
    assert unpacked_q.dtype == unpacked_zeros.dtype == torch.uint8
    assert torch.equal(unpacked_q, q)
    assert torch.equal(unpacked_zeros, zeros)


def test_dequantize_follows_the_definition() -> None:
    q, zeros = random_nibbles(2 * GROUP, 8), random_nibbles(2, 8, seed=1)
    scales = torch.rand(2, 8, generator=torch.Generator().manual_seed(2)).half()
    weight = Int4Matrix(q, zeros, scales).dequantize().t()
    assert weight.dtype == torch.float32
    for k, n in ((0, 0), (GROUP - 1, 3), (GROUP, 7), (2 * GROUP - 1, 5)):
        steps = int(q[k, n]) - int(zeros[k // GROUP, n])
        assert weight[k, n].item() == pytest.approx(steps * scales[k // GROUP, n].item())


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="12 columns are not a multiple of 8"):
        pack_awq(random_nibbles(4, 12), random_nibbles(4, 12))
