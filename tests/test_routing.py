"""Where requests go: cached beginnings against load, ties, sessions."""

import random

import pytest

from serve_app.routing import Candidate, Prompt, RoutingPolicy, choose, num_matched

HASHES = list(range(100, 120))  # 20 blocks of 16 tokens
NUM_TOKENS = 20 * 16 + 5


def candidate(
    name: str, *, num_cached: int = 0, running: int = 0, waiting_tokens: int = 0
) -> Candidate:
    return Candidate(name, running, waiting_tokens, frozenset(HASHES[:num_cached]))


def chosen(*candidates: Candidate, own: str | None = "own", session_id: str | None = None) -> str:
    prompts = [Prompt(NUM_TOKENS, HASHES)]
    return choose(prompts, candidates, block_size=16, own=own, session_id=session_id).id


def test_the_longest_known_beginning_counts_though_shorter_ones_are_not_told() -> None:
    assert num_matched(HASHES, {HASHES[7], 5}) == 8
    assert num_matched(HASHES, {5}) == num_matched([], {5}) == 0


def test_a_cached_beginning_draws_a_request_and_load_repels_it() -> None:
    assert chosen(candidate("own"), candidate("other", num_cached=16)) == "other"
    busy = candidate("other", num_cached=16, waiting_tokens=16 * 16)
    assert chosen(candidate("own"), busy) == "own"
    assert chosen(candidate("own", running=30), busy) == "other"


@pytest.mark.parametrize(("num_cached", "winner"), [(0, "own"), (4, "own"), (5, "other")])
def test_a_small_gain_moves_nothing(num_cached: int, winner: str) -> None:
    assert chosen(candidate("a other"), candidate("own")) == "own"
    assert chosen(candidate("other", num_cached=num_cached), candidate("own")) == winner


def test_without_an_engine_of_its_own_the_least_loaded_wins() -> None:
    assert chosen(candidate("a", running=3), candidate("b", running=2), own=None) == "b"


def test_equals_share_prompts_but_one_prompt_goes_to_one_of_them() -> None:
    candidates = [candidate(name) for name in "abc"]
    homes = {}
    for prompt in range(300):
        prompts = [Prompt(40, [prompt])]
        homes[prompt] = choose(prompts, candidates, block_size=16).id
        again = choose(prompts, random.sample(candidates, 3), block_size=16).id
        assert again == homes[prompt]
    assert all(60 < list(homes.values()).count(name) < 140 for name in "abc")


def test_a_session_stays_and_only_a_leaver_s_sessions_move() -> None:
    candidates = [candidate(name, num_cached=index) for index, name in enumerate("abcd")]
    sessions = [f"session {index}" for index in range(200)]
    before = {s: chosen(*candidates, own="a", session_id=s) for s in sessions}
    assert set(before.values()) == set("abcd")
    after = {s: chosen(*candidates[1:], own="b", session_id=s) for s in sessions}
    assert all(after[s] == before[s] for s in sessions if before[s] != "a")
    assert {after[s] for s in sessions if before[s] == "a"} == set("bcd")


def test_a_session_s_engine_may_be_busier_by_so_much() -> None:
    candidates = [candidate(name) for name in "ab"]
    home = chosen(*candidates, session_id="s")
    slack = RoutingPolicy().session_slack_tokens
    for more, expected in [(0, home), (1, "b" if home == "a" else "a")]:
        loaded = [
            candidate(name, waiting_tokens=slack + more if name == home else 0) for name in "ab"
        ]
        assert chosen(*loaded, session_id="s") == expected
