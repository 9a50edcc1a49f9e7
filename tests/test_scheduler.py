"""Any schedule gives the tokens of one-at-a-time, and blocks are free or referenced, never both."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch, Sampling
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InvalidRequestError, LogitsError
from engine.outputs import SequenceOutput
from engine.sampling_params import SamplingParams
from engine.scheduled_batch import ScheduledBatch
from engine.sequence import EngineRequest
from tests.scripted_executor import ScriptedExecutor, next_token

VOCAB = 50


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    prefix_caching: bool = True,
    num_stages: int = 1,
    spoils: Callable[[], bool] = lambda: False,
    steps_ahead: int = 0,
) -> Engine:
    config = EngineConfig(
        model="scripted",
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=prefix_caching,
    )
    executor = ScriptedExecutor(
        num_blocks=num_blocks,
        block_size=block_size,
        pp=num_stages,
        max_num_seqs=max_num_seqs,
        max_in_flight=num_stages + steps_ahead,
        spoils=spoils,
    )
    return Engine(config, executor)


def request(name: str, prompt: list[int], max_tokens: int = 8, **kwargs: object) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens),
        **kwargs,  # type: ignore[arg-type]
    )


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    history = list(prompt)
    for _ in range(max_tokens):
        history.append(next_token(history, VOCAB))
    return history[len(prompt) :]


def drain(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        engine.scheduler.check_integrity()
    return tokens


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    num_seqs=st.integers(1, 10),
    num_blocks=st.integers(8, 40),
    block_size=st.sampled_from([1, 2, 4, 8]),
    budget=st.integers(1, 24),
    max_num_seqs=st.integers(1, 6),
    prefix_caching=st.booleans(),
    stages=st.sampled_from([(1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]),
    share_invalid=st.sampled_from([0.0, 0.1]),
)
def test_any_schedule_gives_the_tokens_of_one_at_a_time(
    seed: int,
    num_seqs: int,
    num_blocks: int,
    block_size: int,
    budget: int,
    max_num_seqs: int,
    prefix_caching: bool,
    stages: tuple[int, int],
    share_invalid: float,
) -> None:
    """Several stages have as many steps in flight; one stage has a second step ahead, or not."""
    num_stages, steps_ahead = stages
    rng = random.Random(seed)
    engine = make_engine(
        num_blocks,
        block_size,
        max_num_seqs,
        budget,
        prefix_caching,
        num_stages,
        lambda: rng.random() < share_invalid,
        steps_ahead,
    )
    longest = engine.info.session_len - 1
    stem = [rng.randrange(VOCAB) for _ in range(longest)]
    want: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}
    ended_early: set[str] = set()
    for index in range(num_seqs):
        prompt = stem[: rng.randint(1, longest)]
        if rng.random() < 0.3:
            prompt = [*prompt[:-1], rng.randrange(VOCAB)]
        max_tokens = rng.randint(1, 12)
        engine.add(request(str(index), prompt, max_tokens))
        want[str(index)] = expected(prompt, min(max_tokens, longest + 1 - len(prompt)))
        while engine.has_work and rng.random() < 0.6:
            ended_early |= collect(engine, got)
        if rng.random() < 0.15:
            victim = str(rng.randint(0, index))
            engine.abort(victim)
            ended_early.add(victim)
        engine.scheduler.check_integrity()
    while engine.has_work:
        ended_early |= collect(engine, got)
    for name, tokens in want.items():
        if name in ended_early:
            assert got.get(name, []) == tokens[: len(got.get(name, []))]
        else:
            assert got[name] == tokens
    assert engine.scheduler.block_manager.num_free_blocks == num_blocks
    engine.scheduler.check_integrity()


def collect(engine: Engine, got: dict[str, list[int]]) -> set[str]:
    """One step; returns the sequences that ended without a usable token."""
    outputs = engine.step()
    for output in outputs:
        got.setdefault(output.request_id, []).extend(output.token_ids)
    engine.scheduler.check_integrity()
    return {output.request_id for output in outputs if output.error is not None}


def test_decode_rows_come_first_and_prefill_is_chunked() -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.add(request("short", [1, 2, 3], max_tokens=20))
    engine.step()
    engine.add(request("long", list(range(30)), max_tokens=1))
    for _ in range(3):
        scheduled = engine.scheduler.schedule()
        assert scheduled.num_new_tokens == [1, 7]
        assert [seq.request_id for seq in scheduled.seqs] == ["short", "long"]
        assert scheduled.sampled == [0]
        run(engine, scheduled)


def run(engine: Engine, scheduled: ScheduledBatch) -> list[SequenceOutput]:
    sampling = Sampling.build(scheduled)
    batch = Batch.build(scheduled, sampling.scores)
    engine.executor.launch(batch, sampling)
    return engine.scheduler.update(scheduled, engine.executor.collect())


def test_prefix_is_reused_and_reported() -> None:
    engine = make_engine()
    prompt = list(range(13))
    engine.add(request("first", prompt))
    drain(engine)
    engine.add(request("second", prompt))
    output = engine.step()[0]
    assert output.num_cached_tokens == 12  # three full blocks of four; one token is left
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (26, 12)


def test_salted_prefixes_never_meet() -> None:
    engine = make_engine()
    prompt = list(range(13))
    engine.add(request("plain", prompt))
    engine.add(request("mine", prompt, cache_salt="tenant"))
    drain(engine)
    engine.add(request("other", prompt, cache_salt="another"))
    assert engine.step()[0].num_cached_tokens == 0
    engine.add(request("again", prompt, cache_salt="tenant"))
    outputs = {output.request_id: output for output in engine.step()}
    assert outputs["again"].num_cached_tokens == 12


def test_preempted_sequences_resume_with_the_same_tokens() -> None:
    engine = make_engine(num_blocks=8, block_size=2, max_num_batched_tokens=64)
    for index in range(4):
        engine.add(request(str(index), [index, 1, 2], max_tokens=10))
    tokens = drain(engine)
    assert engine.stats().num_preemptions > 0
    for index in range(4):
        assert tokens[str(index)] == expected([index, 1, 2], 10)


def test_resumed_request_continues_after_its_tokens() -> None:
    engine = make_engine()
    full = expected([5, 6, 7], 9)
    engine.add(request("resumed", [5, 6, 7], max_tokens=9, output_token_ids=full[:4]))
    assert drain(engine)["resumed"] == full[4:]


def test_a_resumed_request_does_not_report_its_prompt_again() -> None:
    engine = make_engine()
    prompt = list(range(13))
    engine.add(request("first", prompt))
    drain(engine)
    engine.add(request("resumed", prompt, output_token_ids=expected(prompt, 8)[:2]))
    output = engine.step()[0]
    assert engine.stats().prefix_cache_hits == 12
    assert output.num_cached_tokens == 0


def test_stop_tokens_end_a_sequence_only_after_min_tokens() -> None:
    tokens = expected([3, 1, 4], 12)
    stop = tokens[5]
    first = tokens.index(stop)
    for min_tokens, last in ((0, first), (first + 2, None)):
        engine = make_engine()
        params = SamplingParams(max_tokens=12, min_tokens=min_tokens, stop_token_ids=[stop])
        engine.add(EngineRequest(request_id="a", prompt_token_ids=[3, 1, 4], params=params))
        outputs = [output for _ in range(12) if engine.has_work for output in engine.step()]
        if last is not None:
            assert len(outputs) == last + 1
            assert outputs[-1].finish_reason == "stop"
            assert outputs[-1].stop_token_id == stop
        else:
            assert len(outputs) > first + 1


def test_eos_is_ignored_when_asked() -> None:
    tokens = expected([3, 1, 4], 12)
    for ignore_eos in (False, True):
        engine = make_engine()
        params = SamplingParams(max_tokens=12, ignore_eos=ignore_eos)
        engine.add(
            EngineRequest(
                request_id="a",
                prompt_token_ids=[3, 1, 4],
                params=params,
                eos_token_ids=(tokens[2],),
            )
        )
        assert len(drain(engine)["a"]) == (12 if ignore_eos else tokens.index(tokens[2]) + 1)


def test_the_session_length_ends_a_sequence() -> None:
    engine = make_engine(num_blocks=8, block_size=4)  # room for 32 tokens
    engine.add(request("a", list(range(30)), max_tokens=100))
    outputs = [*engine.step(), *engine.step(), *engine.step()]
    assert [output.finish_reason for output in outputs] == [None, "length"]
    assert not engine.has_work


def test_a_sequence_without_a_usable_token_ends_alone() -> None:
    engine = make_engine()
    engine.add(request("bad", [1, 2]))
    engine.add(request("good", [3, 4]))
    scheduled = engine.scheduler.schedule()
    sampling = Sampling.build(scheduled)
    batch = Batch.build(scheduled, sampling.scores)
    engine.executor.launch(batch, sampling)
    result = replace(engine.executor.collect(), invalid=[0])
    outputs = {output.request_id: output for output in engine.scheduler.update(scheduled, result)}
    assert outputs["bad"].finish_reason == "error"
    assert isinstance(outputs["bad"].error, LogitsError)
    assert outputs["bad"].token_ids == []
    rest = drain(engine)
    assert outputs["good"].token_ids + rest["good"] == expected([3, 4], 8)
    assert "bad" not in rest


@pytest.mark.parametrize(
    ("prompt", "output", "message"),
    [
        ([], [], "empty"),
        (list(range(32)), [], "at most 31"),
        ([1, 50], [], "token id 50"),
        ([-1], [], "token id -1"),
        ([1], [2] * 8, "max_tokens is 8"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(
    prompt: list[int], output: list[int], message: str
) -> None:
    engine = make_engine(num_blocks=8, block_size=4)
    with pytest.raises(InvalidRequestError, match=message):
        engine.add(request("a", prompt, output_token_ids=output))
    assert not engine.has_work


def test_min_tokens_beyond_the_session_is_refused() -> None:
    engine = make_engine(num_blocks=8, block_size=4)
    params = SamplingParams(min_tokens=31)
    with pytest.raises(InvalidRequestError, match="at most 30"):
        engine.add(EngineRequest(request_id="a", prompt_token_ids=[1, 2], params=params))


def test_a_request_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add(request("a", [1]))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(request("a", [2]))


def test_abort_frees_everything_at_once() -> None:
    engine = make_engine(num_blocks=16, max_num_seqs=2)
    for name in "abc":
        engine.add(request(name, list(range(20))))
    engine.step()
    for name in "abc":
        engine.abort(name)
        engine.scheduler.check_integrity()
    engine.abort("unknown")
    assert not engine.has_work
    assert engine.scheduler.block_manager.num_free_blocks == 16
    assert engine.stats().num_waiting_tokens == 0
