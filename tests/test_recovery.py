"""Which sequences another engine gets when one dies, and who is blamed; the engines are stubs."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineDeadError, EngineKilledError, QueueFullError
from engine.outputs import SequenceOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from serve_app.async_engine import MAX_FRUITLESS_DEATHS, AsyncEngine, ShuttingDownError
from serve_app.metrics import Metrics
from serve_app.open_request import OpenRequest
from tests.stub_engine import CONFIG, INFO, StubGroup
from tests.test_streams import run

DEATH = EngineDeadError("engine rank 0 died")


class Engines:
    """An AsyncEngine over stubs; each `die` ends one and starts the next."""

    def __init__(self) -> None:
        self.groups = [StubGroup()]
        self.gate = asyncio.Event()  # closed: the next engine does not come up
        self.gate.set()
        self.engine = AsyncEngine(
            self.group,  # type: ignore[arg-type]
            self._start,  # type: ignore[arg-type]
            CONFIG,
            Metrics("tiny", INFO.session_len),
        )

    @property
    def group(self) -> StubGroup:
        return self.groups[-1]

    async def _start(self) -> StubGroup:
        await self.gate.wait()
        self.groups.append(StubGroup())
        return self.group

    def open(self, *names: str, **params: Any) -> OpenRequest:
        settings = SamplingParams(**{"max_tokens": 9} | params)
        return self.engine.open(
            [
                EngineRequest(request_id=name, prompt_token_ids=[1, 2], params=settings)
                for name in names
            ]
        )

    async def settle(self) -> None:
        """Until every task waits again."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def put(self, name: str, *token_ids: int, **fields: Any) -> None:
        self.group.put(SequenceOutput(name, list(token_ids), **fields))
        await self.settle()

    async def die(self) -> None:
        self.group.die(DEATH)
        await self.settle()


def engines(test: Callable[[Engines], Awaitable[None]]) -> Callable[[], None]:
    """Run a test on a loop, with its engine stopped in the end."""

    def wrapped() -> None:
        async def with_engines() -> None:
            stubs = Engines()
            await test(stubs)
            stubs.engine.stop()

        run(with_engines())

    wrapped.__name__ = test.__name__
    return wrapped


@engines
async def test_the_next_engine_gets_what_is_open_with_its_tokens(stubs: Engines) -> None:
    opened = stubs.open("a", "b", "c", "d", prompt_logprobs=0)
    await stubs.settle()
    first = stubs.group
    scores: list[TokenLogprobs | None] = [None]
    await stubs.put("a", 5, prompt_logprobs=scores)
    await stubs.put("a", 6)
    await stubs.put("c", 7, finish_reason="stop")
    stubs.engine.abort(opened, "d")
    await stubs.die()

    assert first.stopped
    assert stubs.group.calls == [["a", "b"]]
    assert stubs.group.admitted == ["a", "b"]
    a, b = stubs.group.requests.values()
    assert (a.output_token_ids, a.params.prompt_logprobs) == ([5, 6], None)
    waited = first.requests["b"].waited_s
    assert b == replace(first.requests["b"], waited_s=b.waited_s)  # as if it had waited on
    assert b.waited_s > waited > 0
    assert a.seed == first.requests["a"].seed
    assert isinstance(a.seed, int)
    await stubs.put("a", 8, finish_reason="length")
    gained = {index: output.token_ids for index, output in await opened.take()}
    assert gained == {0: [5, 6, 8], 2: [7]}


@engines
async def test_what_happens_while_there_is_no_engine(stubs: Engines) -> None:
    early = stubs.open("a", "b")
    await stubs.settle()
    stubs.gate.clear()
    await stubs.die()
    await stubs.engine.check()  # a pause, not the end
    stubs.engine.abort(early, "a")
    late = stubs.open("c", "d")
    stubs.engine.abort(late, "d")
    stubs.gate.set()
    await stubs.settle()
    assert stubs.group.calls == [["b", "c"]]
    stubs.open("e")
    await stubs.settle()
    assert stubs.group.calls == [["b", "c"], ["e"]]
    assert stubs.group.admitted == ["b", "c"]


@engines
async def test_those_that_wait_for_an_engine_are_bounded(stubs: Engines) -> None:
    stubs.open(*(f"running {i}" for i in range(9)))
    await stubs.settle()
    stubs.gate.clear()
    await stubs.die()
    for index in range(CONFIG.max_waiting_requests):
        stubs.open(f"waiting {index}")
    with pytest.raises(QueueFullError, match="6 requests are waiting"):
        stubs.open("one more")
    stubs.gate.set()
    await stubs.settle()
    assert len(stubs.group.admitted) == 15


@engines
async def test_a_request_that_kills_its_engines_ends_alone(stubs: Engines) -> None:
    good, bad = stubs.open("good", "fine"), stubs.open("bad")
    await stubs.settle()
    await stubs.put("good", 1)
    await stubs.put("bad", 2)
    await stubs.die()
    assert stubs.group.calls == [["good", "fine", "bad"]]
    await stubs.die()
    # Nobody gained a token since the first death: each for itself now, new ones last.
    assert stubs.group.calls == [["good"]]
    late = stubs.open("late")
    await stubs.settle()
    await stubs.put("good", 3)
    assert stubs.group.calls == [["good"], ["fine"]]
    await stubs.put("fine", 4)
    assert stubs.group.calls == [["good"], ["fine"], ["bad"]]
    await stubs.die()  # of whatever those do that run: it may have been good or fine
    assert stubs.group.calls == [["bad"]]
    await stubs.die()  # of bad
    ((_, output),) = await bad.take()
    assert isinstance(output.error, EngineKilledError)
    assert "4 times" in str(output.error)
    assert stubs.group.calls == [["good", "fine", "late"]]
    await stubs.put("late", 5)
    assert (await late.take())[0][1].token_ids == [5]
    assert {index for index, _ in await good.take()} == {0, 1}


@engines
async def test_an_aborted_suspect_makes_room(stubs: Engines) -> None:
    first, second = stubs.open("first"), stubs.open("second")
    await stubs.settle()
    await stubs.die()
    await stubs.die()
    stubs.open("third")
    await stubs.settle()
    stubs.engine.close(first)
    await stubs.settle()
    assert stubs.group.calls == [["first"], ["second"]]
    stubs.engine.close(second)
    await stubs.settle()
    assert stubs.group.calls == [["first"], ["second"], ["third"]]
    assert stubs.group.aborted == ["first", "second"]


@engines
async def test_sequences_that_waited_in_the_queue_are_not_suspected(stubs: Engines) -> None:
    names = [f"{i}" for i in range(CONFIG.max_num_seqs + 3)]
    stubs.open(*names)
    await stubs.settle()
    await stubs.die()
    await stubs.die()
    for _ in range(CONFIG.max_num_seqs):
        await stubs.put(stubs.group.calls[-1][0], 1)
    assert stubs.group.calls[-1] == names[-3:]


@engines
async def test_engines_that_all_die_are_given_up(stubs: Engines) -> None:
    opened = stubs.open(*(f"{i}" for i in range(12)))
    await stubs.settle()
    for _ in range(MAX_FRUITLESS_DEATHS):
        await stubs.engine.check()
        await stubs.die()
    await stubs.die()
    with pytest.raises(EngineDeadError, match="died one after the other without a token"):
        await stubs.engine.check()
    blamed = await opened.take()
    assert all(isinstance(output.error, EngineKilledError) for _, output in blamed)
    with pytest.raises(EngineDeadError, match="died one after the other"):
        await opened.take()
    with pytest.raises(EngineDeadError):
        stubs.open("late")


@engines
async def test_stopping_during_a_recovery(stubs: Engines) -> None:
    opened = stubs.open("a")
    await stubs.settle()
    stubs.gate.clear()
    await stubs.die()
    stubs.engine.stop()
    with pytest.raises(ShuttingDownError):
        await opened.take()
    stubs.gate.set()
    await stubs.settle()
    assert len(stubs.groups) == 1


def test_an_engine_that_dies_at_its_start_is_started_again(tiny_checkpoint: Path) -> None:
    async def test() -> None:
        group, last = StubGroup(), StubGroup()
        group.successors = [DEATH, DEATH, last]
        engine = AsyncEngine(group, group.start_next, CONFIG, Metrics("tiny", 128))  # type: ignore[arg-type]
        request = EngineRequest(request_id="a", prompt_token_ids=[1], params=SamplingParams())
        engine.open([request])
        await group.wait_for(1)
        group.die(RuntimeError("CUDA error"))
        await last.wait_for(1)
        await engine.check()
        engine.stop()

    run(test())
