"""The engine of a GPU, kernels and all, in Triton's interpreter: the tokens of transformers.

Graphs are not recorded here, but their steps are computed padded as they would be replayed.
"""

import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from engine.engine import Engine
from engine.errors import ConfigError
from engine.gpu_memory import reserve
from engine.gpu_worker import GpuWorker
from engine.local_executor import LocalExecutor
from tests.interpreted.gpu_engines import (
    BLOCK_SIZE,
    NUM_TOKENS,
    generate,
    make_engine,
    prompts,
    run_rank,
)
from tests.interpreted.reading import reading_nothing
from tests.test_tensor_parallel import free_port
from tests.tiny_models import TinyModel, tiny_model

# Few heads and short prompts: the interpreter takes 8 ms for one head of one token and layer.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def model(group_size: int | None = None) -> TinyModel:
    return tiny_model("llama", group_size, **SIZES)


def worker_of(engine: Engine) -> GpuWorker:
    executor = engine.executor
    assert isinstance(executor, LocalExecutor)
    worker = executor._worker
    assert isinstance(worker, GpuWorker)
    return worker


@cache
def greedy(index: int, group_size: int | None) -> list[int]:
    """What transformers generates."""
    prompt = prompts()[index]
    with torch.inference_mode():
        output = model(group_size).reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_the_tokens_are_those_of_transformers() -> None:
    """Chunks of prompts beside decode rows, and then a prefix from the cache."""
    engine = make_engine(model().path)
    assert engine.info.max_in_flight == 2
    for chosen in ((0, 1, 4), (5,)):
        for index, output in generate(engine, chosen).items():
            assert output.token_ids == greedy(index, None)
    assert engine.stats().prefix_cache_hits == BLOCK_SIZE


@pytest.mark.parametrize("ahead", [True, False])
def test_int4_weights(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without what a GPU does for speed; launching waits for nothing."""
    switches = {"enable_cuda_graphs": ahead, "enable_async_scheduling": ahead}
    engine = make_engine(model(32).path, **switches)
    assert engine.info.max_in_flight == 1 + ahead
    worker = worker_of(engine)
    monkeypatch.setattr(worker, "launch", reading_nothing(worker.launch))
    for index, output in generate(engine, (0, 1)).items():
        assert output.token_ids == greedy(index, 32)


@pytest.mark.parametrize("quant_policy", [8, 4])
def test_a_quantised_cache_gives_the_tokens_of_a_cpu(quant_policy: int) -> None:
    outputs = [
        generate(make_engine(model().path, quant_policy=quant_policy, device=device), (0, 5))
        for device in ("cpu", "cuda")
    ]
    assert [output.token_ids for output in outputs[0].values()] == [
        output.token_ids for output in outputs[1].values()
    ]


def test_preempted_sequences_go_on_with_the_same_tokens() -> None:
    engine = make_engine(model().path, cache_max_entry_count=3, max_num_batched_tokens=40)
    for index, output in generate(engine, (2, 3)).items():
        assert output.token_ids == greedy(index, None)
    assert engine.stats().num_preemptions > 0


def test_a_stop_is_seen_one_step_late_and_its_row_is_used_again() -> None:
    engine = make_engine(model().path, max_num_seqs=1)
    stop = greedy(1, None)[2]
    outputs = generate(engine, (1,), stop_token_ids=[stop])
    assert outputs[1].finish_reason == "stop"
    last = greedy(1, None).index(stop)
    assert outputs[1].token_ids == greedy(1, None)[: last + 1]
    assert generate(engine, (0,))[0].token_ids == greedy(0, None)


def test_draws_depend_on_seed_and_position_alone() -> None:
    params = {"temperature": 1.0, "seed": 4, "top_p": 0.9, "repetition_penalty": 1.2}
    alone = generate(make_engine(model().path), (1,), **params)[1].token_ids
    other = make_engine(model().path, enable_async_scheduling=False)
    assert generate(other, (0, 1), **params)[1].token_ids == alone


def test_log_probabilities_are_those_of_the_model() -> None:
    index, params = 1, {"logprobs": 2, "prompt_logprobs": 1, "max_tokens": 3}
    output = generate(make_engine(model().path), (index,), **params)[index]
    tokens = prompts()[index] + output.token_ids
    with torch.inference_mode():
        logits = model().reference(torch.tensor([tokens])).logits[0]
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert output.prompt_logprobs is not None
    assert output.logprobs is not None
    entries = [*output.prompt_logprobs[1:], *output.logprobs]
    assert len(entries) == len(tokens) - 1
    for position, entry in enumerate(entries):
        assert entry is not None
        assert entry.token_id == tokens[position + 1]
        assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=1e-4)
        assert entry.top_token_ids[0] == int(expected[position].argmax())


def test_the_cache_is_sized_by_computing_what_takes_most() -> None:
    engine = make_engine(model().path, cache_max_entry_count=0.01, max_num_seqs=2)
    assert engine.info.num_blocks == 2 * 32 // BLOCK_SIZE  # all that two sessions need
    assert generate(engine, (0,))[0].token_ids == greedy(0, None)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of padding nothing is read
def test_what_the_largest_step_takes_is_reserved_without_a_trace() -> None:
    worker = worker_of(make_engine(model().path))
    reserve(worker.model, worker._steps)
    layers = worker._steps._kv_cache.layers
    assert not any(layer.any() for layer in layers if isinstance(layer, torch.Tensor))


def test_a_gpu_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = make_engine(model().path)
    assert generate(engine, (0,), max_tokens=2)[0].token_ids == greedy(0, None)[:2]
    engine.close()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_closed_engine_leaves_no_cache(ahead: bool) -> None:
    """At once: nothing waits for Python to collect cycles."""
    engine = make_engine(model().path, enable_cuda_graphs=ahead)
    assert engine.info.cuda_graphs == ahead
    steps = weakref.ref(worker_of(engine)._steps)
    engine.close()
    assert steps() is None


def test_more_blocks_than_fit_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"no room for the KV cache.* lower cache_max_entry_count"
    ):
        make_engine(model().path, cache_max_entry_count=10**12)


def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    """They share the layers, and tokens that rank 0 draws; or they have half of the layers each."""
    out = tmp_path / "tokens"
    jobs = [(tp, pp, f"127.0.0.1:{free_port()}") for tp, pp in ((2, 1), (1, 2))]
    spawn(run_rank, (jobs, model().path, out), nprocs=2)  # type: ignore[no-untyped-call]
    expected = repr([greedy(index, None) for index in (0, 1)])
    assert out.read_text().split("\n") == [expected, expected]
