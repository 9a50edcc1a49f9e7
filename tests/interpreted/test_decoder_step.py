"""A decoder over a GpuStep, by the Triton kernels, gives what torch gives over the same caches."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kv_cache import KVCache
from engine.models import DecoderSpec, load_decoder, load_spec
from engine.parallel import ParallelGroup
from kernels.attention import AttentionMetadata
from kernels.gpu.step import GpuStep
from kernels.kv_layout import LayerCache, QuantizedKV
from tests.tiny_models import tiny_model

BLOCK_SIZE = 16
# (tokens in the cache, new ones), decode rows first
MIXES = {"decodes and padding": [(20, 1), (37, 1)], "decode and prefill": [(20, 1), (7, 9)]}


def make_step(lengths: list[tuple[int, int]]) -> tuple[AttentionMetadata, GpuStep]:
    """Both descriptions of one step; without a prefill the GPU's has a row of padding."""
    tables = np.random.default_rng(0).permutation(8).reshape(2, 4).astype(np.int32)
    positions = [np.arange(old, old + new, dtype=np.int32) for old, new in lengths]
    slots = np.concatenate(
        [
            table[each // BLOCK_SIZE] * BLOCK_SIZE + each % BLOCK_SIZE
            for table, each in zip(tables, positions, strict=True)
        ]
    )
    starts = np.cumsum([0, *(new for _, new in lengths)], dtype=np.int32)
    lens = np.array([old + new for old, new in lengths], dtype=np.int32)
    num_decodes = sum(new == 1 for _, new in lengths)
    padding = int(num_decodes == len(lengths))
    meta = AttentionMetadata.build(
        starts, lens, tables, slots.astype(np.int32), num_decodes, BLOCK_SIZE, "cpu"
    )
    step = GpuStep(
        input_ids=torch.arange(len(slots) + padding, dtype=torch.int32),
        positions=padded(np.concatenate(positions), padding, 0),
        slot_mapping=padded(slots, padding, -1).long(),
        query_start_loc=padded(starts, padding, int(starts[-1]) + 1),
        context_lens=padded(lens, padding, 0),
        rows=padded(np.array([1, 0]), padding, 0),
        block_tables=torch.from_numpy(tables[::-1].copy()),
        num_decodes=num_decodes + padding,
        max_query_len=max((new for _, new in lengths if new > 1), default=0),
        max_context_len=64,
        block_size=BLOCK_SIZE,
    )
    return meta, step


def padded(values: NDArray[Any], padding: int, value: int) -> Tensor:
    return torch.from_numpy(np.append(values, [value] * padding).astype(np.int32))


def make_cache(spec: DecoderSpec, policy: int) -> KVCache:
    """What came before, and garbage behind it."""
    cache = KVCache.allocate(spec, 8, BLOCK_SIZE, torch.float32, "cpu", 1, quant_policy=policy)
    draw = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        tokens = torch.randn(8 * BLOCK_SIZE, 4, 16, generator=draw)
        if isinstance(layer, QuantizedKV):
            layer.store(tokens, torch.arange(len(tokens)))
        else:
            layer.copy_(tokens.view(8, BLOCK_SIZE, 4, 16).transpose(1, 2))
    return cache


def contents(layer: LayerCache) -> tuple[Tensor, ...]:
    if isinstance(layer, QuantizedKV):
        return layer.gather(torch.arange(8)[None], torch.float32)
    return (layer,)


@pytest.mark.parametrize("policy", [0, 4, 8, 16])
@pytest.mark.parametrize(
    ("family", "mix"), [("llama", "decode and prefill"), ("qwen3", "decodes and padding")]
)
@torch.inference_mode()
def test_both_descriptions_of_a_step_compute_the_same(family: str, mix: str, policy: int) -> None:
    path = tiny_model(family, hidden_size=64, head_dim=16).path
    spec = load_spec(path)
    decoder = load_decoder(path, spec, dtype=torch.float32, device="cpu", group=ParallelGroup())
    cache, other = make_cache(spec, policy), make_cache(spec, policy)
    meta, step = make_step(MIXES[mix])
    num_tokens = len(meta.slot_mapping)
    positions = step.positions[:num_tokens].long()
    expected = decoder.forward(step.input_ids[:num_tokens], positions, meta, cache)
    found = decoder.forward(step.input_ids, step.positions, step, other)[:num_tokens]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for one, two in zip(cache.layers, other.layers, strict=True):
        for a, b in zip(contents(one), contents(two), strict=True):
            assert (a - b).abs().mean() < 1e-5  # a rounding may have gone the other way
