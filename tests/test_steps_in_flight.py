"""Steps that are launched before the last one is collected: one ahead, or one per stage."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch, Sampling
from engine.errors import LogitsError
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from tests.scripted_executor import ScriptedExecutor
from tests.test_scheduler import VOCAB, drain, expected, make_engine, request


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    num_blocks=st.integers(8, 40),
    budget=st.integers(1, 24),
    max_num_seqs=st.integers(1, 6),
)
def test_one_step_ahead_gives_the_same_tokens(
    seed: int, num_blocks: int, budget: int, max_num_seqs: int
) -> None:
    """A step is launched before the values of the last one are known; some of them are the end."""
    rng = random.Random(seed)
    engine = make_engine(num_blocks, 4, max_num_seqs, budget, steps_ahead=1)
    longest = engine.info.session_len - 1
    want: dict[str, list[int]] = {}
    for index in range(rng.randint(1, 8)):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]
        max_tokens = rng.randint(1, 10)
        tokens = expected(prompt, min(max_tokens, longest + 1 - len(prompt)))
        stop = rng.choice(tokens)
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=[stop])
        engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
        want[str(index)] = tokens[: tokens.index(stop) + 1]
    assert drain(engine) == want
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    assert executor.max_in_flight <= 2
    assert engine.scheduler.block_manager.num_free_blocks == num_blocks
    engine.scheduler.check_integrity()


def test_a_stop_costs_one_row_of_the_step_ahead_and_a_limit_none() -> None:
    tokens = expected([1, 2, 3], 6)
    stop = tokens[4]
    num_output = tokens.index(stop) + 1
    for params, num_wasted in (
        (SamplingParams(max_tokens=20, stop_token_ids=[stop]), 1),
        (SamplingParams(max_tokens=num_output), 0),
    ):
        engine = make_engine(steps_ahead=1)
        engine.add(EngineRequest(request_id="a", prompt_token_ids=[1, 2, 3], params=params))
        assert drain(engine) == {"a": tokens[:num_output]}
        executor = engine.executor
        assert isinstance(executor, ScriptedExecutor)
        assert executor.num_tokens_per_step == [3] + [1] * (num_output - 1 + num_wasted)


def test_what_the_step_ahead_computed_for_nothing_can_be_found_as_a_prefix() -> None:
    """The block that the last token fills is computed, because of the wasted row, and whole."""
    tokens = expected([1, 2, 3], 6)
    params = SamplingParams(max_tokens=20, min_tokens=5, stop_token_ids=[tokens[4]])
    engine = make_engine(steps_ahead=1)
    engine.add(EngineRequest(request_id="a", prompt_token_ids=[1, 2, 3], params=params))
    drain(engine)
    history = [1, 2, 3, *tokens[:5]]
    engine.add(request("b", [*history, 9]))
    assert drain(engine)["b"] == expected([*history, 9], 8)
    assert engine.stats().prefix_cache_hits == len(history)


def test_stages_are_kept_busy_with_equal_shares() -> None:
    engine = make_engine(num_stages=2, max_num_batched_tokens=64)
    for index in range(7):
        engine.add(request(str(index), [index, 1, 2], max_tokens=30))
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    assert len(engine.step()) == 7  # alone in flight: nothing was left for a second step
    for _ in range(10):
        assert len(engine.step()) in (3, 4)
        assert executor.num_in_flight == 1
    assert executor.num_tokens_per_step[:5] == [21, 4, 3, 4, 3]
    assert executor.max_in_flight == 2
    for index in range(7):
        engine.abort(str(index))
    assert engine.has_work  # what is in flight has to come back
    assert engine.step() == []
    assert not engine.has_work
    engine.scheduler.check_integrity()


def test_a_long_prompt_s_chunks_follow_each_other_through_the_stages() -> None:
    engine = make_engine(num_stages=3, max_num_batched_tokens=8)
    engine.add(request("long", list(range(30)), max_tokens=2))
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    assert engine.step() == []
    assert executor.num_tokens_per_step == [8, 8, 8]
    assert drain(engine)["long"] == expected(list(range(30)), 2)
    assert executor.num_tokens_per_step == [8, 8, 8, 6, 1]


def test_a_preempted_sequence_whose_pending_token_is_unusable_leaves_nothing() -> None:
    engine = make_engine(num_stages=2)
    scheduler = engine.scheduler
    engine.add(request("a", [1, 2, 3]))
    scheduled = scheduler.schedule()
    sampling = Sampling.build(scheduled)
    engine.executor.launch(Batch.build(scheduled, sampling.scores), sampling)
    scheduler._preempt(scheduled.seqs[0])
    assert scheduler.num_waiting_tokens == 4
    (output,) = scheduler.update(scheduled, replace(engine.executor.collect(), invalid=[0]))
    assert isinstance(output.error, LogitsError)
    assert scheduler.num_waiting_tokens == 0
    scheduler.check_integrity()


def test_what_is_in_flight_is_computed_before_the_ranks_are_released() -> None:
    engine = make_engine(num_stages=3, max_num_batched_tokens=8)
    engine.add(request("a", list(range(30))))
    engine.step()
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    assert executor.num_in_flight == 2
    engine.close()
    assert executor.closed
