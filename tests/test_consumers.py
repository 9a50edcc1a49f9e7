"""One engine, several consumers: each sees its own outputs, and leaves nothing running behind."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from engine.batcher import RequestBatcher
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineDeadError, QueueFullError
from engine.outboxes import OWNER
from engine.outputs import SequenceOutput
from engine.pollers import Pollers
from engine.prefix import prefix_hashes
from tests.test_batcher import GatedExecutor
from tests.test_scheduler import expected, request
from tests.test_streams import run


class Consumers:
    """A batcher, and what each consumer has taken of it."""

    def __init__(self, **limits: int) -> None:
        self.executor = GatedExecutor()
        self.engine = Engine(EngineConfig(model="scripted", max_num_seqs=8), self.executor)
        self.told: list[set[str]] = []
        self.batcher = RequestBatcher(
            self.engine,
            max_waiting_requests=limits.get("max_waiting_requests", 100),
            max_waiting_tokens=10_000,
            step_timeout_s=60,
            on_output=self.told.append,
        )

    def take(self, consumer: str, *names: str) -> dict[str, SequenceOutput]:
        """Everything the consumer gets until all of `names` have ended."""
        found: dict[str, SequenceOutput] = {}
        deadline = time.monotonic() + 30
        while not all(name in found and found[name].finish_reason for name in names):
            assert time.monotonic() < deadline
            for output in self.batcher.take(consumer)[0]:
                earlier = found.setdefault(output.request_id, output)
                if earlier is not output:
                    earlier.merge(output)
        return found

    def settle(self) -> None:
        """Until the engine has nothing to do, so that what was asked for has happened."""
        self.batcher.submit([request("settle", [1], max_tokens=1)])
        self.take(OWNER, "settle")


@pytest.fixture
def consumers() -> Iterator[Consumers]:
    consumers = Consumers()
    yield consumers
    consumers.executor.gate.set()
    consumers.batcher.stop()


def test_each_gets_its_own_outputs(consumers: Consumers) -> None:
    prompts = {f"{who}{i}": [i + 1, len(who)] for who in (OWNER, "a", "bb") for i in range(5)}
    for consumer in ("a", "bb"):
        consumers.batcher.enter(consumer)
    for name, prompt in prompts.items():
        consumer = name.rstrip("0123456789")
        consumers.batcher.submit([request(name, prompt, max_tokens=15)], consumer=consumer)
    for consumer in (OWNER, "a", "bb"):
        mine = [name for name in prompts if name.rstrip("0123456789") == consumer]
        found = consumers.take(consumer, *mine)
        assert sorted(found) == mine
        assert all(found[name].token_ids == expected(prompts[name], 15) for name in mine)


def test_one_who_leaves_ends_its_sequences_and_no_others(consumers: Consumers) -> None:
    consumers.batcher.enter("a")
    consumers.executor.gate.clear()
    consumers.batcher.submit([request("mine", [1], max_tokens=30)])
    consumers.batcher.submit([request("theirs", [2], max_tokens=100)], consumer="a")
    consumers.batcher.leave("a")
    consumers.batcher.submit([request("late", [3])], consumer="a")
    consumers.executor.gate.set()
    assert consumers.take(OWNER, "mine")["mine"].token_ids == expected([1], 30)
    consumers.settle()
    blocks = consumers.engine.scheduler.block_manager
    assert blocks.num_free_blocks == blocks.num_blocks
    with pytest.raises(EngineDeadError, match="has left"):
        consumers.batcher.take("a")


def test_an_id_that_left_can_come_again_at_once(consumers: Consumers) -> None:
    """As when a replica loses sight of an engine that lives and joins it anew."""
    consumers.executor.gate.clear()
    consumers.batcher.enter("before")
    consumers.batcher.submit([request("x", [4], max_tokens=20)], consumer="before")
    assert consumers.executor.entered.wait(30)
    consumers.batcher.leave("before")
    consumers.batcher.enter("after")
    consumers.batcher.submit([request("x", [4], max_tokens=20)], consumer="after")
    consumers.executor.gate.set()
    assert consumers.take("after", "x")["x"].token_ids == expected([4], 20)


def test_an_abort_may_overtake_its_submission(
    consumers: Consumers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray's calls do: large arguments take another way. It holds for its consumer alone."""
    monkeypatch.setattr("engine.outboxes.MAX_CLOSED_EARLY", 2)
    consumers.batcher.enter("a")
    consumers.batcher.abort(["forgotten", "x", "y"], consumer="a")
    consumers.batcher.submit([request("x", [1], max_tokens=100)], consumer="a")
    consumers.batcher.submit([request("y", [2], max_tokens=5)])
    consumers.batcher.submit([request("forgotten", [3], max_tokens=5)], consumer="a")
    consumers.take(OWNER, "y")
    assert consumers.take("a", "forgotten").keys() == {"forgotten"}
    assert not consumers.engine.has_work


def test_nobody_aborts_or_takes_what_is_another_s(consumers: Consumers) -> None:
    consumers.batcher.enter("a")
    consumers.executor.gate.clear()
    consumers.batcher.submit([request("mine", [1], max_tokens=5)])
    consumers.batcher.abort(["mine"], consumer="a")
    consumers.batcher.submit([request("mine", [9])], consumer="a")  # an id that is in use
    consumers.executor.gate.set()
    assert consumers.take("a", "mine")["mine"].error is not None
    assert consumers.take(OWNER, "mine")["mine"].token_ids == expected([1], 5)


def test_the_queue_s_bound_is_one_for_all_and_refusals_find_their_way() -> None:
    consumers = Consumers(max_waiting_requests=1)
    consumers.batcher.enter("a")
    consumers.executor.gate.clear()
    consumers.batcher.submit([request("running", [1])])
    assert consumers.executor.entered.wait(30)
    consumers.batcher.submit([request("waiting", [1])])
    consumers.batcher.submit([request("refused", [1])], consumer="a")
    assert isinstance(consumers.take("a", "refused")["refused"].error, QueueFullError)
    assert {"a"} in consumers.told
    consumers.executor.gate.set()
    consumers.take(OWNER, "running", "waiting")
    consumers.batcher.stop()


def test_a_fault_is_told_to_all(consumers: Consumers) -> None:
    consumers.batcher.enter("a")
    consumers.executor.error = RuntimeError("device lost")
    consumers.batcher.submit([request("x", [1])])
    for consumer in (OWNER, "a"):
        with pytest.raises(EngineDeadError, match="device lost"):
            consumers.take(consumer, "x")
    assert consumers.told[-1] == {OWNER, "a"}


def test_the_prefixes_told_are_those_a_prompt_finds_again(consumers: Consumers) -> None:
    prompt, other = list(range(21)), list(range(30, 50))
    consumers.batcher.submit([request("x", prompt, max_tokens=1)])
    consumers.batcher.submit([request("y", other, max_tokens=1)])
    consumers.take(OWNER, "x", "y")
    consumers.batcher.prefixes()
    consumers.settle()
    known = set(consumers.batcher.prefixes())
    assert known.issuperset(prefix_hashes([*prompt[:16], 7, 7, 7, 7, 7], 4, None)[:4])
    assert known.issuperset(prefix_hashes(other, 4, None))
    assert known.isdisjoint(prefix_hashes(prompt, 4, "a tenant's salt"))
    assert known.isdisjoint(prefix_hashes(prompt[1:], 4, None))


def test_a_silent_consumer_is_given_up_and_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.pollers.POLL_S", 0.01)
    monkeypatch.setattr("engine.pollers.SILENCE_S", 0.05)
    lost: list[str] = []

    async def test() -> None:
        pollers = Pollers(lost.append)
        pollers.enter("silent")
        pollers.enter("alive")
        owner = asyncio.ensure_future(pollers.wait(OWNER))
        async with asyncio.timeout(30):
            while not lost:
                await pollers.wait("alive")
        assert lost == ["silent"]
        with pytest.raises(EngineDeadError, match="heard nothing"):
            await pollers.wait("silent")
        assert not owner.done()
        with pytest.raises(AssertionError, match="next poll follows"):
            await pollers.wait(OWNER)
        assert pollers.leave("alive")
        assert not pollers.leave("alive")
        pollers.wake({OWNER, "alive"})
        await owner

    run(test())
