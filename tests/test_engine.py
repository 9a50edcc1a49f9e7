"""The whole engine on a real model: whatever the schedule, the tokens of transformers.generate."""

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.local_executor import LocalExecutor
from engine.outputs import SequenceOutput
from engine.parallel import ParallelGroup
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from tests.tiny_models import TinyModel, tiny_model

VOCAB = 131
MAX_TOKENS = 12


def model() -> TinyModel:
    return tiny_model("llama")


def make_engine(tiny: TinyModel, **settings: object) -> Engine:
    values = {"dtype": "float32", "num_threads": 1, "block_size": 4, "max_num_seqs": 8}
    config = EngineConfig.from_dict({"model": str(tiny.path)} | values | settings)
    return Engine(config, LocalExecutor(config))


@cache
def shared_engine(budget: int, num_blocks: int, prefix_caching: bool) -> Engine:
    return make_engine(
        model(),
        max_num_batched_tokens=budget,
        cache_max_entry_count=num_blocks,
        enable_prefix_caching=prefix_caching,
    )


@cache
def prompts() -> list[list[int]]:
    rng = random.Random(7)
    stem = [rng.randrange(VOCAB) for _ in range(60)]
    lengths = [1, 2, 3, 5, 17, 40, 59]
    own = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    shared = [[*stem[:length], rng.randrange(VOCAB)] for length in (4, 8, 30, 31, 59)]
    return own + shared


@cache
def greedy(index: int) -> list[int]:
    """What transformers generates, one prompt at a time."""
    prompt = prompts()[index]
    with torch.inference_mode():
        output = model().reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),  # token 0 is the padding, but here a token
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def request(name: str, prompt: list[int], **params: object) -> EngineRequest:
    settings = {"temperature": 0.0, "max_tokens": MAX_TOKENS} | params
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(**settings),  # type: ignore[arg-type]
    )


def run(engine: Engine, requests: list[EngineRequest]) -> dict[str, SequenceOutput]:
    for each in requests:
        engine.add(each)
    outputs: dict[str, SequenceOutput] = {}
    while engine.has_work:
        collect(engine.step(), outputs)
    engine.scheduler.check_integrity()
    return outputs


def collect(new: list[SequenceOutput], outputs: dict[str, SequenceOutput]) -> None:
    for output in new:
        earlier = outputs.setdefault(output.request_id, output)
        if earlier is not output:
            earlier.merge(output)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.sampled_from([3, 16, 128]),
    num_blocks=st.sampled_from([24, 200]),
    prefix_caching=st.booleans(),
)
def test_any_schedule_gives_the_tokens_of_transformers(
    seed: int, budget: int, num_blocks: int, prefix_caching: bool
) -> None:
    rng = random.Random(seed)
    engine = shared_engine(budget, num_blocks, prefix_caching)
    order = rng.sample(range(len(prompts())), rng.randint(1, len(prompts())))
    outputs: dict[str, SequenceOutput] = {}
    for index in order:
        engine.add(request(str(index), prompts()[index]))
        while engine.has_work and rng.random() < 0.5:
            collect(engine.step(), outputs)
    while engine.has_work:
        collect(engine.step(), outputs)
    engine.scheduler.check_integrity()
    for index in order:
        assert outputs[str(index)].token_ids == greedy(index)


def test_a_small_cache_preempts_and_changes_nothing() -> None:
    engine = shared_engine(128, 24, False)
    before = engine.stats().num_preemptions
    outputs = run(engine, [request(str(i), prompt) for i, prompt in enumerate(prompts())])
    assert engine.stats().num_preemptions > before
    for index in range(len(prompts())):
        assert outputs[str(index)].token_ids == greedy(index)


def test_a_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    engine = shared_engine(16, 200, True)
    sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 42}
    prompt = prompts()[4]
    alone = run(engine, [request("alone", prompt, **sampled)])["alone"].token_ids
    others = [request(f"other{i}", other, temperature=1.0) for i, other in enumerate(prompts())]
    mixed = [*others[:5], request("mixed", prompt, **sampled), *others[5:]]
    assert run(engine, mixed)["mixed"].token_ids == alone
    resumed = EngineRequest(
        request_id="resumed",
        prompt_token_ids=prompt,
        params=mixed[5].params,
        output_token_ids=alone[:5],
    )
    assert run(engine, [resumed])["resumed"].token_ids == alone[5:]


def test_logprobs_are_those_of_the_model() -> None:
    engine = shared_engine(16, 200, True)
    prompt = prompts()[5]
    params = {"logprobs": 3, "prompt_logprobs": 2, "max_tokens": 6}
    output = run(engine, [request("a", prompt, **params)])["a"]
    tokens = prompt + output.token_ids
    with torch.inference_mode():
        logits = model().reference(torch.tensor([tokens])).logits[0].double()
    expected = torch.log_softmax(logits, dim=-1)
    assert output.prompt_logprobs is not None
    assert output.logprobs is not None
    assert output.prompt_logprobs[0] is None
    entries = [*output.prompt_logprobs[1:], *output.logprobs]
    assert len(entries) == len(tokens) - 1
    for position, entry in enumerate(entries):
        assert entry is not None
        row = expected[position]
        assert entry.token_id == tokens[position + 1]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        top = row.topk(2 if position < len(prompt) - 1 else 3)
        assert entry.top_token_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1


def test_each_request_gets_the_alternatives_it_asked_for() -> None:
    engine = shared_engine(128, 200, True)
    requests = [request(str(n), prompts()[3], prompt_logprobs=n, logprobs=n) for n in (1, 4, 0)]
    outputs = run(engine, requests)
    for n in (1, 4, 0):
        entries = [*(outputs[str(n)].prompt_logprobs or [])[1:], *(outputs[str(n)].logprobs or [])]
        assert len(entries) == len(prompts()[3]) - 1 + MAX_TOKENS
        assert all(entry is not None and len(entry.top_token_ids) == n for entry in entries)


def test_prompt_logprobs_survive_preemption() -> None:
    engine = shared_engine(16, 24, True)
    scored = run(engine, [request("a", prompts()[5], prompt_logprobs=0)])["a"]
    crowd = [request(str(i), prompt) for i, prompt in enumerate(prompts())]
    again = run(engine, [*crowd, request("b", prompts()[5], prompt_logprobs=0)])["b"]
    assert scored.prompt_logprobs is not None
    assert again.prompt_logprobs is not None
    assert [e and e.token_id for e in again.prompt_logprobs] == [None, *prompts()[5][1:]]
    for one, two in zip(scored.prompt_logprobs[1:], again.prompt_logprobs[1:], strict=True):
        assert one is not None
        assert two is not None
        assert one.logprob == pytest.approx(two.logprob, abs=1e-4)


def test_session_len_is_bounded_by_config_and_cache() -> None:
    assert shared_engine(16, 24, True).info.session_len == 96  # 24 blocks of 4
    assert shared_engine(16, 200, True).info.session_len == 128  # the checkpoint's
    assert make_engine(model(), session_len=50).info.session_len == 50


class GroupWithAPoorRank(ParallelGroup):
    """Its other rank has room for one block."""

    def min(self, value: int) -> int:
        return min(value, 1)


@pytest.mark.parametrize("count", [0.5, 28])
def test_when_one_rank_has_no_room_all_refuse(count: float) -> None:
    executor = make_engine(model(), cache_max_entry_count=count).executor
    assert isinstance(executor, LocalExecutor)
    rank = executor._worker.model
    assert rank.count_blocks(2**30) > 1
    with pytest.raises(ConfigError, match=r"no room for the KV cache.*on another rank less"):
        replace(rank, group=GroupWithAPoorRank()).count_blocks(2**30)


def test_one_sequence_of_less_than_a_block_can_be_served() -> None:
    engine = make_engine(
        model(), max_num_seqs=1, session_len=4, block_size=8, cache_max_entry_count=0.5
    )
    engine.add(request("0", prompts()[2][:2], max_tokens=2))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert len(tokens) == 2


def test_an_engine_says_what_became_of_its_settings(caplog: pytest.LogCaptureFixture) -> None:
    """Graphs and steps ahead are for GPUs."""
    with caplog.at_level("INFO", logger="engine.engine"):
        info = make_engine(model()).info
    assert (info.cuda_graphs, info.max_in_flight) == (False, 1)
    assert "device='cpu'" in caplog.text
    assert "max_in_flight=1, cuda_graphs=False" in caplog.text
