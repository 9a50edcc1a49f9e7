"""The cache's shapes and the bytes a block is said to take agree."""

import pytest
import torch

from engine.kv_cache import KVCache, bytes_per_block
from engine.models import load_spec
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_zero_and_counted_right(tp: int, kv_heads: int, dtype: torch.dtype) -> None:
    spec = load_spec(tiny_model("llama").path)
    cache = KVCache.allocate(spec, 5, 8, dtype, "cpu", tp)
    assert len(cache.layers) == spec.num_layers
    layers = [layer for layer in cache.layers if isinstance(layer, torch.Tensor)]
    assert len(layers) == len(cache.layers)
    for tensor in layers:
        assert tensor.shape == (5, 2 * kv_heads, 8, spec.head_dim)
        assert tensor.dtype == dtype
        assert not tensor.any()
    assert len({tensor.data_ptr() for tensor in layers}) == spec.num_layers
    assert sum(tensor.nbytes for tensor in layers) == 5 * bytes_per_block(spec, 8, dtype, tp)


def test_blocks_can_be_written() -> None:
    spec = load_spec(tiny_model("llama").path)
    cache = KVCache.allocate(spec, 2, 4, torch.bfloat16, "cpu", 1)
    first, second = cache.layers[:2]
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    first[1, :, 2] = 3.0
    assert first.float().sum() == 3.0 * 4 * spec.head_dim
    assert not second.any()
