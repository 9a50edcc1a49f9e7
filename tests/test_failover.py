"""Engines that die under open streams: the answers are those of a run that nothing disturbed.

Real actors, real signals, in float32: a token computed again is then the same token.
"""

import asyncio
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.errors import EngineDeadError
from engine.ray_actor import EngineActor
from engine.ray_group import EngineGroup
from tests.test_replica import RunningReplica

pytestmark = pytest.mark.ray

Bodies = list[tuple[str, dict[str, Any]]]
LONGEST = 120  # tokens of the longest answers, by which faults are timed
SETTINGS = {"cache_max_entry_count": 1200, "num_threads": 1}


def mixed_bodies(count: int, salt: str) -> Bodies:
    """Requests of every kind by turns. The salt keeps a run from finding another's prefixes."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1, "seed": 7, "top_p": 0.9, "n": 2},
        {"temperature": 0, "logprobs": 2, "echo": True},
        {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 1, "seed": 3, "frequency_penalty": 0.4, "logit_bias": {"40": 2}},
        {"temperature": 1, "seed": 4, "stop": ["e", "1"], "min_tokens": 40, "max_tokens": 90},
        {"temperature": 0, "logprobs": 0, "prompt_logprobs": 1, "stream": False},
        {"temperature": 1, "seed": 6, "ignore_eos": False, "min_tokens": 9, "stream": False},
    ]
    common = {"model": "tiny", "max_tokens": LONGEST, "ignore_eos": True, "stream": True}
    common |= {"return_token_ids": True, "cache_salt": salt}
    bodies: Bodies = []
    for index in range(count):
        body = common | kinds[index % len(kinds)] | {"prompt": f"{index} quick foxes"}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        bodies.append(("/v1/completions", body))
    return bodies


async def answer(running: RunningReplica, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a client has in the end: per choice the joined pieces, and the usage."""
    response = await running.client.post(path, json=body)
    assert response.status_code == 200, response.text
    lines = [response.text]
    if body["stream"]:
        *lines, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", ""), response.text[-500:]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices: dict[int, dict[str, Any]] = {}
    for part in (part for event in events for part in event["choices"]):
        join(choices.setdefault(part["index"], {}), part)
    return {"choices": choices, "usage": events[-1]["usage"]}


def join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Text and lists grow, objects grow inside, the last of anything else stays."""
    for name, value in part.items():
        if isinstance(value, dict):
            join(whole.setdefault(name, {}), value)
        elif isinstance(value, list) or name == "text":
            whole[name] = value if whole.get(name) is None else whole[name] + value
        elif value is not None:
            whole[name] = value


async def answers(running: RunningReplica, bodies: Bodies) -> list[dict[str, Any]]:
    return await asyncio.gather(*(answer(running, path, body) for path, body in bodies))


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for the last bits of log probabilities, which depend on the batch."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


async def disturbed(
    running: RunningReplica, bodies: Bodies, faults: dict[int, Callable[[EngineGroup], Any]]
) -> list[dict[str, Any]]:
    """The answers when each fault happens once an answer has so many tokens."""
    engine = running.engine
    asking = asyncio.ensure_future(answers(running, bodies))
    before = 0
    for num_tokens, fault in sorted(faults.items()):
        # Each engine gets further than the last: what makes no progress would be blamed.
        while (group := engine._group) is None or longest(running) < max(num_tokens, before + 1):
            assert not asking.done(), "too late for the fault"
            await asyncio.sleep(0.001)
        before = longest(running)
        await fault(group)
        while engine._group is group:
            await asyncio.sleep(0.001)
            assert not asking.done(), "nobody noticed"
        await engine.check()
    return await asking


def longest(running: RunningReplica) -> int:
    return max((len(s.token_ids) for s in running.engine._sequences.values()), default=0)


async def in_rank(group: EngineGroup, rank: int, function: Callable[[EngineActor], Any]) -> Any:
    actor: Any = group._actors[rank]
    return await actor.__ray_call__.remote(function)


async def send(group: EngineGroup, rank: int, number: signal.Signals) -> None:
    os.kill(await in_rank(group, rank, lambda actor: os.getpid()), number)


def fault(name: str, rank: int = 0) -> Callable[[EngineGroup], Any]:
    def raises(actor: EngineActor) -> None:
        def launch(*step: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        executor: Any = actor._running()._engine.executor
        executor.launch = launch

    def soon_hung(actor: EngineActor) -> None:
        actor._running()._step_timeout_s = 1

    async def stops(group: EngineGroup) -> None:
        await in_rank(group, 0, soon_hung)
        await send(group, rank, signal.SIGSTOP)

    def hangs(actor: EngineActor) -> None:
        actor._running()._step_timeout_s = 1
        engine: Any = actor._running()._engine
        engine.step = threading.Event().wait

    faults: dict[str, Callable[[EngineGroup], Any]] = {
        "killed": lambda group: send(group, rank, signal.SIGKILL),
        "stopped": stops,
        "raises": lambda group: in_rank(group, rank, raises),
        "hangs": lambda group: in_rank(group, rank, hangs),
    }
    return faults[name]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp=1", "tp=2"])
def running(
    request: pytest.FixtureRequest, ray_cluster: None, tiny_checkpoint: Path
) -> Iterator[RunningReplica]:
    running = RunningReplica(tiny_checkpoint, tp=request.param, **SETTINGS)
    yield running
    running.close()


@pytest.fixture(scope="module")
def undisturbed(running: RunningReplica) -> list[dict[str, Any]]:
    return running.run(answers(running, mixed_bodies(64, "undisturbed")))


FAULTS = [("killed", 0), ("killed", 1), ("raises", 0), ("hangs", 0), ("stopped", 1)]


@pytest.mark.parametrize(("name", "rank"), FAULTS)
def test_64_streams_outlive_an_engine(
    running: RunningReplica,
    undisturbed: list[dict[str, Any]],
    name: str,
    rank: int,
) -> None:
    if rank >= running.engine.info.tp:
        pytest.skip("no such rank")
    bodies = mixed_bodies(64, f"{name} {rank}")
    found = running.run(disturbed(running, bodies, {LONGEST // 2: fault(name, rank)}))
    assert_same(found, undisturbed)
    assert running.get("/health").status_code == 200


def test_greedy_answers_are_those_of_transformers(
    running: RunningReplica, undisturbed: list[dict[str, Any]], tiny_checkpoint: Path
) -> None:
    prompt = running.post("/tokenize", prompt="0 quick foxes").json()["tokens"]
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=LONGEST,
            do_sample=False,
            eos_token_id=None,
        )
    assert undisturbed[0]["choices"][0]["token_ids"] == output[0, len(prompt) :].tolist()


def test_engines_that_die_at_random_tokens(
    running: RunningReplica, undisturbed: list[dict[str, Any]]
) -> None:
    rng = random.Random(5)
    tp = running.engine.info.tp
    faults = {
        num_tokens: fault(rng.choice(["killed", "killed", "raises"]))
        if tp == 1
        else fault("killed", rng.randrange(tp))
        for num_tokens in rng.sample(range(1, LONGEST - 10), 3)
    }
    found = running.run(disturbed(running, mixed_bodies(16, "chaos"), faults))
    assert_same(found, undisturbed[:16])


def test_an_idle_engine_that_dies_is_replaced(running: RunningReplica) -> None:
    async def test() -> None:
        group = running.engine._group
        assert group is not None
        await send(group, 0, signal.SIGKILL)
        while running.engine._group is group:
            await asyncio.sleep(0.001)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "ignore_eos": True}
        response = await running.client.post("/v1/completions", json=body)  # arrives meanwhile
        assert response.json()["usage"]["completion_tokens"] == 3

    running.run(test())


def test_rank_0_that_gives_no_sign_is_dead(
    ray_cluster: None, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.ray_group.CHECK_TIMEOUT_S", 1)
    running = RunningReplica(tiny_checkpoint)

    async def test() -> None:
        group = running.engine._group
        assert group is not None
        await send(group, 0, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="gave no sign for 1 s"):
            await group.check()

    running.run(test())
    running.close()
