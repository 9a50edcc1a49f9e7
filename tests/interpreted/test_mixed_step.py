"""A step of decode rows and chunks: both kernels together give what the CPU's path gives."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.attention import AttentionMetadata, paged_attention
from kernels.gpu.step import GpuStep
from kernels.kv_layout import POLICIES
from tests.interpreted.attention_reference import Shape, random_cache, random_step

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows past the end

MIXES = {  # keys and queries of sequences
    "decodes and chunks": [(9, 1), (40, 1), (1, 1), (50, 18), (20, 20)],
    "one of each": [(33, 1), (17, 16)],
    "chunks": [(30, 30), (40, 2)],
    "decodes": [(16, 1), (31, 1)],
    "the last chunk of a prompt has one token": [(40, 1), (30, 5), (25, 1)],
}


def on_the_cpu(step: GpuStep) -> AttentionMetadata:
    tables = step.block_tables[step.rows.long(), :-1].contiguous().numpy()
    return AttentionMetadata.build(
        query_start_loc=step.query_start_loc.numpy(),
        context_lens=step.context_lens.numpy(),
        block_tables=tables,
        slot_mapping=np.zeros(step.num_tokens, dtype=np.int32),
        num_decodes=step.num_decodes,
        block_size=step.block_size,
        device="cpu",
    )


def attend(shape: Shape, mix: str, window: int | None) -> tuple[Tensor, Tensor]:
    lengths = MIXES[mix]
    step = random_step([n for n, _ in lengths], [n for _, n in lengths], shape.block_size)
    cache = random_cache(shape, step)
    # The poison of unused slots: torch multiplies what it hides by 0.
    (cache if isinstance(cache, Tensor) else cache.params.view(torch.float16)).nan_to_num_()
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(step.num_tokens, shape.num_heads, shape.head_dim, generator=draw)
    scale = shape.head_dim**-0.5
    found = paged_attention(q, cache, step, scale, window)
    return found, paged_attention(q, cache, on_the_cpu(step), scale, window)


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("mix", MIXES)
def test_plain(mix: str, window: int | None) -> None:
    found, expected = attend(Shape(8, 2, 64, 16), mix, window)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_quantised(policy: int, head_dim: int) -> None:
    found, expected = attend(Shape(6, 2, head_dim, 16, policy), "decodes and chunks", None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
