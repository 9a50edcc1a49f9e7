"""One replica among others: whose engine gets a request, and where it goes on; all are stubs."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.errors import EngineDeadError
from engine.outboxes import OWNER
from engine.outputs import EngineStats, SequenceOutput
from engine.prefix import prefix_hashes
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from serve_app import finder
from serve_app.async_engine import AsyncEngine
from serve_app.directory import Directory, Entry
from serve_app.engines import Engines
from serve_app.metrics import Metrics
from tests.stub_engine import CONFIG, INFO, StubGroup
from tests.test_streams import run

DEATH = EngineDeadError("engine rank 0 died")
PROMPT = list(range(100))
HASHES = prefix_hashes(PROMPT, INFO.block_size, None)


class Guest(StubGroup):
    consumer = "guest"


class World:
    """Engines over stubs. Engine `name` is replica `name`'s; its groups are the joins of it."""

    def __init__(self, *, has_own: bool = True) -> None:
        self.metrics = Metrics("tiny", INFO.session_len)
        self.own = StubGroup()
        self.own.prefixes = self._prefixes  # type: ignore[attr-defined]
        self.joins: dict[str, list[Guest]] = {}
        self.dead: set[str] = set()  # engines that are dead when they are joined
        self.attached: list[str | Exception | Entry] = []  # what the next calls of `attach` find
        own = AsyncEngine(cast(Any, self.own), self.own.start_next, CONFIG, self.metrics)
        if not has_own:
            own.stop()
        self.engines = Engines(
            replica_id="me",
            version="1",
            config=CONFIG,
            metrics=self.metrics,
            join=self._join,
            refer=lambda group: cast(Any, SimpleNamespace(id="me", info=INFO)),
            own=own if has_own else None,
            attach=None if has_own else self._attach,
        )

    async def _prefixes(self) -> list[int]:
        return []

    def _join(self, engine: Any) -> Any:
        guest = Guest(engine.id)
        if engine.id in self.dead:
            guest.is_joined = False
            guest.die(DEATH)
        self.joins.setdefault(engine.id, []).append(guest)
        return guest

    async def _attach(self) -> Entry:
        found = self.attached.pop(0)
        if isinstance(found, Exception):
            raise found
        return entry(found) if isinstance(found, str) else found

    async def tell(self, *entries: Entry) -> None:
        if self.engines.own is not None:
            await self.engines.describe("tiny")
        self.engines.update(entries)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


def entry(
    name: str,
    *,
    engine: str | None = None,
    prefixes: int = 0,
    running: int = 0,
    version: str = "1",
) -> Entry:
    """Of a replica whose cache holds so many blocks of PROMPT."""
    ref = SimpleNamespace(id=engine or name, info=INFO)
    return Entry(name, "tiny", version, cast(Any, ref), running, 0, HASHES[:prefixes])


def request(name: str, prompt: list[int] = PROMPT) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=9)
    )


def world(
    **options: bool,
) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[], None]]:
    """Run a test on a loop, with everything stopped in the end."""

    def decorate(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        def wrapped() -> None:
            async def with_world() -> None:
                made = World(**options)
                await test(made)
                made.engines.stop()

            run(with_world())

        wrapped.__name__ = test.__name__
        return wrapped

    return decorate


@world()
async def test_a_replica_that_is_alone_uses_its_own_engine(world: World) -> None:
    world.engines.open([request("a")])
    await world.settle()
    assert list(world.own.requests) == ["a"]


@world()
async def test_a_request_goes_where_its_beginning_is_cached(world: World) -> None:
    await world.tell(entry("other", prefixes=6), entry("third"))
    opened = world.engines.open([request("a")])
    world.engines.open([request("b", [9] * 50)])
    await world.settle()
    (guest,) = world.joins["other"]
    assert (list(guest.requests), list(world.own.requests)) == (["a"], ["b"])
    guest.put(SequenceOutput("a", [5]))
    assert (await opened.take())[0][1].token_ids == [5]
    world.engines.close(opened)
    await world.settle()
    assert guest.aborted == ["a"]
    assert world.engines.num_open == 1


@world()
async def test_what_was_sent_counts_until_it_is_told(world: World) -> None:
    await world.tell(entry("other"))
    for index in range(20):
        world.engines.open([request(str(index), [index] * 90)])
    await world.settle()
    groups = [world.own, *world.joins["other"]]
    assert min(len(each.requests) for each in groups) > 7


@world()
async def test_a_replica_s_share_of_a_load_is_counted_as_it_is_now(world: World) -> None:
    """Not as it was told: a burst of one tenant stays where its beginning is cached."""
    await world.tell(entry("other", prefixes=6))
    opened = [world.engines.open([request(str(index))]) for index in range(2)]
    await world.settle()
    (guest,) = world.joins["other"]
    assert len(guest.requests) == 2
    await world.tell(entry("other", prefixes=6, running=2))
    for index, each in enumerate(opened):
        guest.put(SequenceOutput(str(index), [5], finish_reason="stop"))
        await each.take()
        world.engines.close(each)
    for index in range(2, 4):  # beside 2 others they would cost more than it saves
        world.engines.open([request(str(index))])
    await world.settle()
    assert len(guest.requests) == 4


@world()
async def test_a_dead_guest_engine_s_sequences_go_on_in_the_own_one(world: World) -> None:
    await world.tell(entry("other", prefixes=6))
    opened = world.engines.open([request("a")])
    await world.settle()
    world.joins["other"][0].put(SequenceOutput("a", [5, 6]))
    await world.settle()
    world.joins["other"][0].die(DEATH)
    await world.settle()
    (second,) = world.joins["me"]  # as a guest of the engine of its own
    assert world.joins["other"][0].stopped
    assert second.requests["a"].output_token_ids == [5, 6]
    assert second.admitted == ["a"]
    second.put(SequenceOutput("a", [7], finish_reason="stop"))
    await world.settle()
    assert (await opened.take())[0][1].token_ids == [5, 6, 7]
    world.engines.open([request("b")])  # although the directory still tells of it
    await world.settle()
    assert list(world.own.requests) == ["b"]


@world()
async def test_another_engine_of_that_replica_is_used_again(world: World) -> None:
    await world.tell(entry("other", prefixes=6))
    world.engines.open([request("a")])
    await world.settle()
    world.joins["other"][0].die(DEATH)
    await world.settle()
    await world.tell(entry("other", engine="its second", prefixes=6))
    world.engines.open([request("b")])
    await world.settle()
    assert list(world.joins["its second"][0].requests) == ["b"]


@world()
async def test_nothing_is_started_for_a_guest_with_nothing_open(world: World) -> None:
    await world.tell(entry("other", prefixes=6))
    world.engines.close(world.engines.open([request("a")]))
    await world.settle()
    world.joins["other"][0].die(DEATH)
    await world.settle()
    assert list(world.joins) == ["other"]
    await world.tell()
    assert not world.engines._guests


@world()
async def test_while_the_own_engine_is_replaced_others_take_requests(world: World) -> None:
    await world.tell(entry("other"))
    started = asyncio.Event()

    async def start() -> Any:
        await started.wait()
        return StubGroup()

    assert world.engines.own is not None
    world.engines.own._start_group = start
    world.own.die(DEATH)
    await world.settle()
    world.engines.open([request("a")])
    await world.settle()
    assert list(world.joins["other"][0].requests) == ["a"]


@world(has_own=False)
async def test_a_model_without_replicas_is_woken(world: World) -> None:
    world.attached = ["x"]
    await world.engines.ready()
    world.engines.open([request("a")])
    await world.engines.ready()  # there is one: nobody is asked
    world.engines.open([request("b", [1] * 40)])
    await world.settle()
    assert list(world.joins["x"][0].requests) == ["a", "b"]
    assert world.engines.info == INFO


@world(has_own=False)
async def test_its_sequences_wait_for_the_next_replica(world: World) -> None:
    world.attached = ["x"]
    await world.engines.ready()
    world.engines.open([request("a")])
    await world.settle()
    world.joins["x"][0].put(SequenceOutput("a", [5]))
    await world.settle()
    world.attached = [EngineDeadError("starting"), "y"]
    finder.RETRY_S, before = 0.001, finder.RETRY_S
    world.joins["x"][0].die(DEATH)
    while "y" not in world.joins:
        await asyncio.sleep(0.001)
    finder.RETRY_S = before
    await world.settle()
    assert world.joins["y"][0].requests["a"].output_token_ids == [5]


@world(has_own=False)
async def test_a_request_behind_the_last_engine_s_death_waits_too(world: World) -> None:
    world.attached = ["x"]
    await world.engines.ready()
    world.engines.close(world.engines.open([request("a")]))
    await world.settle()
    world.joins["x"][0].die(DEATH)
    await world.settle()
    world.attached = ["y"]
    world.engines.open([request("b")])
    world.joins["x"][1].die(DEATH)  # it is still dead
    await world.settle()
    assert list(world.joins["y"][0].requests) == ["b"]
    await world.tell(entry("y"))
    assert len(world.engines._all_guests()) == 1


@world(has_own=False)
async def test_replicas_of_another_model_share_its_requests(world: World) -> None:
    await world.tell(entry("x"), entry("y", running=12))
    for index in range(10):
        world.engines.open([request(str(index), [index] * 40)])
    await world.settle()
    assert len(world.joins["x"][0].requests) > len(world.joins["y"][0].requests) >= 2


@world()
async def test_an_engine_is_described_as_it_is(world: World) -> None:
    world.own.put(SequenceOutput("unknown"))
    await world.settle()
    assert world.engines.own is not None
    world.engines.own.stats = EngineStats(num_running=2, num_waiting=3, num_waiting_tokens=40)
    told = await world.engines.describe("tiny")
    assert (told.replica_id, told.num_sequences, told.num_waiting_tokens) == ("me", 5, 0)
    world.engines.own.stats = EngineStats(num_running=2, num_waiting_tokens=50)
    told = await world.engines.describe("tiny")
    assert (told.num_sequences, told.num_waiting_tokens) == (2, 40)  # what waited all the time
    looked_up = {"prefix_cache_queries": 1000, "prefix_cache_hits": 1000}
    world.engines.own.stats = EngineStats(num_waiting_tokens=50, **looked_up)
    assert (await world.engines.describe("tiny")).num_waiting_tokens == 40  # less is to compute
    assert told.engine is not None
    assert world.own.consumer == OWNER


def test_the_directory_forgets_who_leaves_and_who_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = Directory()
    assert directory.exchange(entry("a")) == []
    assert [each.replica_id for each in directory.exchange(entry("b"))] == ["a"]
    directory.leave("a")
    assert directory.exchange(entry("c")) == [entry("b")]
    monkeypatch.setattr("serve_app.directory.EXPIRY_S", 0.0)
    assert directory.exchange(entry("c")) == []
