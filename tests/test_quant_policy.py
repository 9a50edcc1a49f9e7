"""quant_policy: engines and decoders over quantised keys and values, against plain ones."""

import random
from functools import cache

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.kv_cache import KVCache, bytes_per_block, check_quant_policy
from engine.local_executor import LocalExecutor
from engine.models import load_spec
from engine.outputs import SequenceOutput
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from kernels.attention import paged_attention
from kernels.kv_layout import QuantizedKV, dequantize_kv, quantize_kv
from tests.paged_decoding import PagedDecoder
from tests.test_kernels_attention import MIXES, Case, make_case, reference
from tests.tiny_models import TinyModel, tiny_model

POLICIES = (4, 8, 16)
VOCAB = 131
MAX_TOKENS = 8


def model() -> TinyModel:
    return tiny_model("llama", hidden_size=64)  # heads of 16


@cache
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    stem = [rng.randrange(VOCAB) for _ in range(70)]
    own = [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 5, 40, 59)]
    return own + [[*stem[:length], rng.randrange(VOCAB)] for length in (16, 33, 59, 70)]


def make_engine(policy: int, budget: int, num_blocks: int, prefix_caching: bool) -> Engine:
    config = EngineConfig(
        model=str(model().path),
        dtype="float32",
        num_threads=1,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        cache_max_entry_count=num_blocks,
        enable_prefix_caching=prefix_caching,
        quant_policy=policy,
    )
    return Engine(config, LocalExecutor(config))


def generate(engine: Engine, indices: list[int]) -> dict[str, list[int]]:
    """Requests that come while others run."""
    rng = random.Random(len(indices))
    tokens: dict[str, list[int]] = {str(index): [] for index in indices}
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)

    def take(outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            tokens[output.request_id] += output.token_ids

    for index in indices:
        engine.add(
            EngineRequest(request_id=str(index), prompt_token_ids=prompts()[index], params=params)
        )
        while engine.has_work and rng.random() < 0.3:
            take(engine.step())
    while engine.has_work:
        take(engine.step())
    engine.scheduler.check_integrity()
    return tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_any_schedule_gives_the_tokens_of_one_at_a_time(policy: int) -> None:
    """In chunks, beside others, behind a cached prefix, and again after a preemption."""
    everything = list(range(len(prompts())))
    lone = make_engine(policy, 128, 64, prefix_caching=False)
    alone = {key: value for i in everything for key, value in generate(lone, [i]).items()}
    for budget, num_blocks, prefix_caching in ((16, 64, True), (128, 9, True), (48, 9, False)):
        engine = make_engine(policy, budget, num_blocks, prefix_caching)
        assert generate(engine, everything) == alone
        assert generate(engine, everything[::-1]) == alone
        stats = engine.stats()
        assert num_blocks > 9 or stats.num_preemptions > 0
        assert (stats.prefix_cache_hits > 0) == prefix_caching


@pytest.mark.parametrize(("policy", "bound"), [(8, 0.03), (16, 0.17), (4, 0.5)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_close_to_plain_ones(family: str, policy: int, bound: float) -> None:
    """Relative to their spread; at any chunking the same."""
    path = tiny_model(family, hidden_size=64, head_dim=16).path
    prompt = prompts()[-1]
    plain = PagedDecoder(path).logits(prompt)
    whole = PagedDecoder(path, quant_policy=policy).logits(prompt)
    pieces = PagedDecoder(path, quant_policy=policy).logits(prompt, chunk=9)
    error = (whole - plain).norm() / (plain - plain.mean(-1, keepdim=True)).norm()
    assert 0 < error < bound
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mix", ["decodes of many lengths", "decodes and prefills"])
def test_attention_is_that_over_dequantised_values(
    mix: str, policy: int, head_dim: int, window: int | None
) -> None:
    """Against float64, whatever lay in the blocks before."""
    case = make_case(MIXES[mix], (4, 2, head_dim), window, torch.float32, block_size=16)
    cache = QuantizedKV.allocate(len(case.cache), 2, 16, head_dim, policy, "cpu")
    tokens = case.cache.float().transpose(1, 2).flatten(0, 1)  # by slot
    tokens[case.meta.slot_mapping] = case.kv.float()
    cache.store(tokens, torch.arange(len(tokens)))
    found = paged_attention(case.q.float(), cache, case.meta, head_dim**-0.5, window)
    seen = dequantize_kv(*quantize_kv(tokens, policy), policy).double()
    torch.testing.assert_close(found.double(), expected(case, seen, window), rtol=1e-4, atol=1e-5)


def expected(case: Case, tokens: torch.Tensor, window: int | None) -> torch.Tensor:
    """Attention over tokens [slots, 2 * Hkv, D]."""
    parts, starts = [], case.meta.query_start_loc
    for seq, length in enumerate(case.meta.context_lens):
        positions = np.arange(length)
        slots = case.meta.block_tables[seq, positions // 16] * 16 + positions % 16
        queries = case.q[starts[seq] : starts[seq + 1]]
        keys, values = tokens[slots].chunk(2, dim=1)
        parts.append(reference(queries, keys, values, window))
    return torch.cat(parts)


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_take_the_bytes_that_are_counted(policy: int) -> None:
    spec = load_spec(model().path)
    cache = KVCache.allocate(spec, 5, 16, torch.float32, "cpu", 1, quant_policy=policy)
    counted = bytes_per_block(spec, 16, torch.float32, 1, quant_policy=policy)
    assert sum(layer.nbytes for layer in cache.layers) == 5 * counted
    assert counted < bytes_per_block(spec, 16, torch.bfloat16, 1)


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(model().path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    check_quant_policy(spec, 8, "cuda")
    check_quant_policy(spec, 16, "cpu")
    with pytest.raises(ConfigError, match=r"capability 8\.9 or later, not 8\.6; use .* 8 or 4"):
        check_quant_policy(spec, 16, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_quant_policy(spec, 16, "cuda")


def test_refusals() -> None:
    for policy in (2, True, "8", 8.0):
        with pytest.raises(ConfigError, match="quant_policy must be one of 0, 4, 8, 16, got"):
            EngineConfig(model="m", quant_policy=policy)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="block_size must be at least 16 with quant_policy 8"):
        EngineConfig(model="m", quant_policy=8, block_size=8)
    config = EngineConfig(model=str(tiny_model("llama").path), quant_policy=8, device="cpu")
    with pytest.raises(ConfigError, match="multiple of 16, this checkpoint's is 12"):
        LocalExecutor(config)
