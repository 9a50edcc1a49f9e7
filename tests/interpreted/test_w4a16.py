"""The W4A16 kernels against float64 products of the dequantised weight."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.gpu import tiles, w4a16, w4a16_tiles
from kernels.gpu.chip import HOPPER, Chip
from kernels.gpu.w4a16 import is_gated_best, w4a16_linear, w4a16_silu_mul
from kernels.gpu.w4a16_dequantise import dequantise
from kernels.gpu.w4a16_pack import W4A16Weight, pack_w4a16
from kernels.gpu.w4a16_tiles import MAX_KERNEL_ROWS, Tile, choose_tile
from kernels.int4_linear import int4_linear, int4_silu_mul, pack_int4
from kernels.partials import Partials, summed
from kernels.stored_weight import restore, store

# The interpreter computes in float32 and cuts what it rounds to bf16 off: 2^-7.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    symmetric: bool = False,
    order: Tensor | None = None,
) -> tuple[W4A16Weight, Tensor]:
    """A weight, and its value in float64 [N, K], inputs in the layer's order."""
    generator = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 16, (k, n), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (k // group_size, n), generator=generator, dtype=torch.uint8)
    zeros = torch.full_like(zeros, 8) if symmetric else zeros
    scales = (torch.rand(k // group_size, n, generator=generator) + 0.5).to(dtype)
    weight = pack_int4(q, zeros, scales, dtype, "cuda", input_order=order)
    assert isinstance(weight, W4A16Weight)
    assert (weight.zeros is None) == symmetric
    exact = (q.double().view(-1, group_size, n) - zeros.double()[:, None]) * scales.double()[
        :, None
    ]
    value = exact.view(k, n).t()
    if order is not None:
        value = torch.zeros_like(value).index_copy_(1, order, value)
    return weight, value


def check(found: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    assert found.shape == expected.shape
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < factor * TOLERANCE[found.dtype], error


def tiled(monkeypatch: pytest.MonkeyPatch, *values: object, **more: object) -> None:
    """Every product of 16-bit activations uses this tile."""
    tile = Tile(*values, **more)  # type: ignore[arg-type]
    monkeypatch.setattr(w4a16_tiles, "DEFAULTS", dict.fromkeys(w4a16_tiles.BUCKETS, tile))
    monkeypatch.setattr(w4a16_tiles, "EXACT", tile)


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs begin as NaN, and so does what lies behind them, which nobody may write."""
    behind: list[Tensor] = []
    new_empty = Tensor.new_empty

    def guarded(like: Tensor, *shape: int, **kwargs: Any) -> Tensor:
        size = math.prod(shape)
        if size == 0:  # the interpreter's own
            return new_empty(like, *shape, **kwargs)
        memory = new_empty(like, size + 4096, **kwargs).fill_(torch.nan)
        behind.append(memory[size:])
        return memory[:size].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", guarded)
    yield
    assert all(bool(each.isnan().all()) for each in behind)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("m", "bias"), [(1, False), (17, True)])
def test_linear(dtype: torch.dtype, symmetric: bool, m: int, bias: bool) -> None:
    weight, exact = packed(192, 384, 128, dtype, symmetric)
    x = normal(m, 384, seed=1, dtype=dtype)
    added = normal(192, seed=2, dtype=dtype) * 20 if bias else None
    expected = x.double() @ exact.t() + (0 if added is None else added.double())
    check(summed(int4_linear(x, weight, added)), expected)
    parts = w4a16_linear(x, weight, added, partial=True)
    assert isinstance(parts, Partials)
    check(summed(parts), expected)


@pytest.mark.parametrize("scale", ["after", "before"])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "symmetric"),
    [
        (64, 96, 32, True),
        (72, 192, 64, False),
        (8, 128, 128, False),
        (200, 224, 32, False),
        (64, 192, 96, False),
        (320, 256, 128, False),
        (64, 256, 32, False),  # four groups in a step
        (128, 384, 64, True),  # two
        (64, 512, 256, False),
    ],
)
def test_shapes(
    monkeypatch: pytest.MonkeyPatch, n: int, k: int, group_size: int, symmetric: bool, scale: str
) -> None:
    tiled(monkeypatch, 16, 128, 128, 4, 3, scale, splits=1)  # else a part has one step
    weight, exact = packed(n, k, group_size, symmetric=symmetric)
    x = normal(5, k, seed=3)
    check(summed(int4_linear(x, weight, None)), x.double() @ exact.t())
    assert torch.equal(dequantise(weight).double(), exact.float().double())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [24, 64, 96, 100, 384])
def test_one_scale_for_all_of_k(k: int, symmetric: bool) -> None:
    weight, exact = packed(128, k, k, symmetric=symmetric)
    x = normal(3, k, seed=4)
    check(summed(int4_linear(x, weight, None)), x.double() @ exact.t())
    assert torch.equal(dequantise(weight).double(), exact.float().double())


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 8])
def test_splits(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    tiled(monkeypatch, 16, 64, 64, 4, 3, "after", splits=splits)
    weight, exact = packed(64, 448, 64)  # 7 steps: no multiple of the splits
    x, bias = normal(18, 448, seed=5), normal(64, seed=6)
    y = int4_linear(x, weight, bias, partial=True)
    assert isinstance(y, Partials) == (splits > 1)
    check(summed(y), x.double() @ exact.t() + bias.double())


@pytest.mark.parametrize(("m", "tile"), [(33, 64), (100, 128)])
def test_many_rows(m: int, tile: int) -> None:
    weight, exact = packed(128, 128, 64, torch.bfloat16)
    assert w4a16_tiles.DEFAULTS[w4a16_tiles.bucket_of(m)].block_m == tile
    x = normal(m, 128, seed=7, dtype=torch.bfloat16)
    check(summed(int4_linear(x, weight, None)), x.double() @ exact.t())


def test_more_rows_than_the_kernel_takes() -> None:
    weight, exact = packed(64, 128, 64)
    x, bias = normal(MAX_KERNEL_ROWS + 1, 128, seed=8), normal(64, seed=9)
    expected = x.double() @ exact.t() + bias.double()
    check(summed(int4_linear(x, weight, bias, partial=True)), expected)
    gate, up = expected.chunk(2, dim=1)
    check(int4_silu_mul(x, weight, bias), silu(gate) * up)


def test_a_tuned_tile_may_leave_the_product_to_cublas() -> None:
    weight, exact = packed(128, 128, 64, torch.float16)
    x = normal(40, 128, seed=8, dtype=torch.float16) / 20
    bias = normal(128, seed=9, dtype=torch.float16)
    expected = x.double() @ exact.t() + bias.double()
    gate, up = expected.chunk(2, dim=1)
    for kernel in ("w4a16", "w4a16_gated"):
        tile = w4a16.candidates(kernel, n=128, k=128, group=64, m=64)[-1]
        assert tile["block_m"] == 0
        with tiles.trial(kernel, tile):
            check(summed(int4_linear(x, weight, bias)), expected)
            check(int4_silu_mul(x, weight, bias), silu(gate) * up, factor=3)


def test_order_of_inputs() -> None:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    weight, exact = packed(128, 128, 32, order=order)
    x = normal(4, 128, seed=10)
    check(summed(int4_linear(x, weight, None)), x.double() @ exact.t())
    x = normal(MAX_KERNEL_ROWS + 1, 128, seed=10)
    check(summed(int4_linear(x, weight, None)), x.double() @ exact.t())


def test_order_of_inputs_with_padding() -> None:
    """The last group has 20 of its 32 inputs, and 12 rows of its zero point."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (128, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (4, 64), generator=generator, dtype=torch.uint8)
    order = torch.randperm(116, generator=generator)
    q[116:] = zeros[3]
    padded = torch.cat((order, order[:1].repeat(12)))
    weight = pack_int4(q, zeros, torch.ones(4, 64), torch.float32, "cuda", input_order=padded)
    exact = torch.zeros(64, 116, dtype=torch.float64)
    exact[:, order] = (q.double() - zeros.double().repeat_interleave(32, 0)).t()[:, :116]
    for num_rows in (3, MAX_KERNEL_ROWS + 1):
        x = normal(num_rows, 116, seed=10)
        check(summed(int4_linear(x, weight, None)), x.double() @ exact.t())
    up = normal(3, 116, seed=11) / 50
    gate, half = (up.double() @ exact.t()).chunk(2, dim=1)
    check(int4_silu_mul(up, weight, None), silu(gate) * half, factor=3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("half", "m", "block_n", "group_size"),
    [(64, 3, 128, 32), (192, 17, 256, 128), (64, 1, 128, 256)],
)
def test_gated(
    monkeypatch: pytest.MonkeyPatch,
    half: int,
    m: int,
    block_n: int,
    group_size: int,
    dtype: torch.dtype,
) -> None:
    tiled(monkeypatch, 16, block_n, 128, 4, 3, "after")
    weight, exact = packed(2 * half, 256, group_size, dtype)
    x, bias = normal(m, 256, seed=11, dtype=dtype) / 50, normal(2 * half, seed=12, dtype=dtype)
    gate, up = (x.double() @ exact.t() + bias.double()).chunk(2, dim=1)
    expected = silu(gate) * up
    check(w4a16_silu_mul(x, weight, bias), expected, factor=3)
    assert not is_gated_best(x, weight)  # so few outputs: K is cut instead
    check(int4_silu_mul(x, weight, bias), expected, factor=3)
    monkeypatch.setattr(w4a16, "chip_of", lambda device: Chip(1, 90))
    assert is_gated_best(x, weight)
    check(int4_silu_mul(x, weight, bias), expected, factor=3)


def test_gated_halves_that_are_no_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4a16, "chip_of", lambda device: Chip(1, 90))
    weight, exact = packed(2 * 96, 128, 64)
    x = normal(3, 128, seed=13) / 50
    assert not is_gated_best(x, weight)
    gate, up = (x.double() @ exact.t()).chunk(2, dim=1)
    check(int4_silu_mul(x, weight, None), silu(gate) * up)


def test_results_repeat() -> None:
    weight, _ = packed(128, 512, 128, torch.bfloat16)
    x = normal(16, 512, seed=14, dtype=torch.bfloat16)
    first, second = (summed(int4_linear(x, weight, None)) for _ in range(2))
    assert torch.equal(first, second)


def test_parts_of_larger_tensors_are_packed() -> None:
    """A rank's columns of a checkpoint's tensors, as they are read."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (128, 512), generator=generator, dtype=torch.uint8)[:, :256]
    zeros = torch.randint(0, 16, (2, 512), generator=generator, dtype=torch.uint8)[:, :256]
    scales = torch.rand(2, 512, generator=generator)[:, :256]
    part = pack_w4a16(q, zeros, scales, torch.float32, "cuda")
    q, zeros, scales = (x.contiguous() for x in (q, zeros, scales))
    whole = pack_w4a16(q, zeros, scales, torch.float32, "cuda")
    assert torch.equal(dequantise(part), dequantise(whole))


def test_a_stored_weight_comes_back() -> None:
    weight, _ = packed(72, 96, 32, order=torch.arange(96).flip(0))
    form, tensors = store("w", weight)
    restored = restore(json.loads(json.dumps(form)), tensors)
    x = normal(2, 96, seed=15)
    assert restored.shape == weight.shape
    assert torch.equal(summed(int4_linear(x, restored, None)), summed(int4_linear(x, weight, None)))


def test_padding_is_zero() -> None:
    q = torch.full((96, 72), 15, dtype=torch.uint8)
    ones = torch.ones(3, 72)
    weight = pack_w4a16(q, ones.to(torch.uint8), ones, torch.float32, "cuda")
    assert weight.words.shape == (2, 2, 64, 8)
    assert weight.scales.shape == (3, 256)
    assert weight.scales[:, 72:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("rows", "n", "k", "splits"),
    [
        (1, 6144, 4096, 4),
        (16, 6144, 4096, 8),
        (64, 6144, 4096, 5),
        (1, 4096, 4096, 4),
        (16, 4096, 14336, 8),
        (1, 28672, 4096, 1),
    ],
)
def test_parts_are_as_many_as_balance_the_sms(rows: int, n: int, k: int, splits: int) -> None:
    tile = choose_tile("w4a16", n, k, 128, torch.bfloat16, rows, HOPPER)
    assert tile.splits == splits


def test_what_came_before_and_beside_hopper_takes_narrower_tiles() -> None:
    """sm_120 has no wgmma either."""
    hopper, ampere, rtx = (
        choose_tile("w4a16", 4096, 4096, 128, torch.bfloat16, 100, Chip(132, capability))
        for capability in (90, 80, 120)
    )
    assert rtx == ampere != hopper
