"""Packed weights on their way to a GPU are copied whole, in pieces of any size."""

import pytest
import torch
from torch import Tensor

from engine.weights import upload as upload_module
from engine.weights.packed_file import Packed
from engine.weights.upload import to_host, upload
from kernels.dense_linear import DenseWeight
from kernels.gpu.w4a16_pack import W4A16Weight


def values() -> dict[str, Packed]:
    generator = torch.Generator().manual_seed(0)
    return {
        "norm": torch.randn(7, generator=generator),
        "table": torch.randn(6, 9, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
        "dense": DenseWeight(torch.randn(4, 3, generator=generator), reordered=False),
        "int4": W4A16Weight(
            words=torch.randint(-9, 9, (1, 1, 64, 8), generator=generator, dtype=torch.int32),
            scales=torch.randn(2, 256, generator=generator).half(),
            zeros=None,
            input_order=torch.arange(64),
            shape=(64, 64),
            group_size=32,
        ),
    }


def tensors(value: Packed) -> list[Tensor]:
    if isinstance(value, W4A16Weight):
        assert (value.zeros, value.shape, value.group_size) == (None, (64, 64), 32)
        assert value.input_order is not None
        return [value.words, value.scales, value.input_order]
    if isinstance(value, DenseWeight):
        assert not value.reordered
        return [value.data]
    assert isinstance(value, Tensor)
    return [value]


@pytest.mark.parametrize("stage_bytes", [8, 40, 1 << 20])
def test_copies_are_whole(stage_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "STAGE_BYTES", stage_bytes)
    found = upload(dict(to_host(values().items())), "cpu")
    assert list(found) == list(values())
    for name, value in values().items():
        for copy, original in zip(tensors(found[name]), tensors(value), strict=True):
            assert copy.dtype == original.dtype
            assert torch.equal(copy, original)


def test_a_copy_shares_no_memory_with_the_file() -> None:
    weights = values()
    before = {name: [t.clone() for t in tensors(value)] for name, value in weights.items()}
    found = upload(weights, "cpu")
    for value in weights.values():
        for tensor in tensors(value):
            tensor.zero_()
    for name, value in found.items():
        for copy, original in zip(tensors(value), before[name], strict=True):
            assert torch.equal(copy, original)
