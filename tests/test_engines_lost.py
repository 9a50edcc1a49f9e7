"""Engines that die, leave or are of another version, seen from a replica; all are stubs."""

import asyncio

import pytest

from engine.errors import EngineDeadError, QueueFullError
from engine.outputs import EngineStats, SequenceOutput
from serve_app import async_engine, engines, finder
from serve_app.finder import OtherVersionError
from serve_app.open_request import OpenRequest
from tests.stub_engine import INFO
from tests.test_engines import DEATH, HASHES, PROMPT, World, entry, request, world


async def taken(opened: OpenRequest) -> SequenceOutput:
    ((_, output),) = await asyncio.wait_for(opened.take(), 5)
    return output


@world(has_own=False)
async def test_engines_that_die_together_are_each_tried_once(world: World) -> None:
    await world.tell(entry("a"), entry("b", running=1), entry("c", running=2))
    opened = world.engines.open([request("1")])
    await world.settle()
    world.dead |= {"b"}
    world.joins["a"][0].die(DEATH)
    await world.settle()
    assert {name: len(joins) for name, joins in world.joins.items()} == {"a": 1, "b": 1, "c": 1}
    world.joins["c"][0].put(SequenceOutput("1", [5], finish_reason="stop"))
    assert (await taken(opened)).token_ids == [5]


@world(has_own=False)
async def test_engines_that_were_dead_before_are_no_fault_of_a_request(world: World) -> None:
    names = [f"{i:02}" for i in range(12)]
    world.dead |= set(names[1:-1])
    await world.tell(*(entry(name, running=10 * i) for i, name in enumerate(names)))
    opened = world.engines.open([request("1")])
    await world.settle()
    world.joins["00"][0].die(DEATH)
    for _ in range(10):
        await world.settle()
    world.joins[names[-1]][0].put(SequenceOutput("1", [5]))
    assert (await taken(opened)).token_ids == [5]


@world(has_own=False)
async def test_a_replica_that_was_stopped_is_no_fault_of_a_request(
    world: World,
) -> None:
    names = [f"{i}" for i in range(async_engine.BLAME_DEATHS + 2)]
    await world.tell(*(entry(name, running=10 * i) for i, name in enumerate(names)))
    opened = world.engines.open([request("1")])
    for i, name in enumerate(names[:-1]):
        await world.settle()
        await world.tell(*(entry(each) for each in names[i + 1 :]))  # it leaves, then ends
        world.joins[name][0].die(DEATH)
    await world.settle()
    world.joins[names[-1]][0].put(SequenceOutput("1", [5]))
    assert (await taken(opened)).token_ids == [5]


@world()
async def test_engines_of_another_version_get_nothing(world: World) -> None:
    await world.tell(entry("new", prefixes=6, version="2"))
    world.engines.open([request("a")])
    await world.settle()
    assert not world.joins
    assert list(world.own.requests) == ["a"]


@world(has_own=False)
async def test_a_found_engine_of_another_version_is_not_used(
    world: World,
) -> None:
    finder.RETRY_S, before = 0.001, finder.RETRY_S
    finder.UPDATE_S, patience = 0.003, finder.UPDATE_S
    world.attached = [entry("new", version="2"), "old"]
    await world.engines.ready()
    world.engines.open([request("a")])
    await world.settle()
    assert list(world.joins) == ["old"]
    await world.tell()
    world.joins["old"][0].die(DEATH)
    world.attached = [entry("new", version="2")] * 3
    with pytest.raises(OtherVersionError):
        await world.engines.ready()
    finder.RETRY_S, finder.UPDATE_S = before, patience


@world(has_own=False)
async def test_those_that_wait_for_a_model_share_one_call_and_are_bounded(world: World) -> None:
    world.attached = ["x"]
    await asyncio.gather(*(world.engines.ready() for _ in range(6)))
    assert not world.attached
    await world.tell()
    world.attached = [EngineDeadError("starting")]
    waiting = [asyncio.ensure_future(world.engines.ready()) for _ in range(6)]
    await world.settle()
    with pytest.raises(QueueFullError, match="6 requests wait"):
        await world.engines.ready()
    for each in waiting:
        each.cancel()
    await world.settle()
    world.attached = ["y"]
    await world.engines.ready()  # nobody waits any more, and another call is made
    assert not world.attached


@world(has_own=False)
async def test_requests_behind_the_last_engine_s_death_share_one_guest(world: World) -> None:
    world.attached = ["x"]
    await world.engines.ready()
    world.engines.open([request("a")])
    await world.settle()
    world.attached = [EngineDeadError("starting")]
    world.joins["x"][0].die(DEATH)
    await world.settle()
    await world.tell()
    for index in range(3):
        world.engines.open([request(f"{index}", [index])])
    await world.settle()
    assert len(world.engines._all_guests()) == 1


@world()
async def test_an_owner_whose_engines_compute_for_guests_alone_does_not_give_up(
    world: World,
) -> None:
    assert world.engines.own is not None
    group = world.own
    for _ in range(async_engine.MAX_FRUITLESS_DEATHS + 2):
        group.stats = EngineStats(num_generation_tokens=7)
        group.put()
        await world.settle()
        group.successors = [type(group)()]
        successor = group.successors[0]
        world.engines.own._start_group = group.start_next
        group.die(DEATH)
        await world.settle()
        assert isinstance(successor, type(group))
        group = successor
    await world.engines.check()


@world()
async def test_what_waits_counts_until_its_first_output(world: World) -> None:
    await world.tell(entry("other", prefixes=6))
    opened = world.engines.open([request("a"), request("b")])
    peer = world.engines._peers["other"]
    num_new = len(PROMPT) - 6 * INFO.block_size
    assert (peer.mine.num_sequences, peer.mine.num_waiting_tokens) == (2, num_new)
    await world.settle()
    world.joins["other"][0].put(SequenceOutput("a", [5], finish_reason="stop"))
    await world.settle()
    assert (peer.mine.num_sequences, peer.mine.num_waiting_tokens) == (1, 0)
    world.engines.close(opened)
    assert peer.mine.num_sequences == 0


@world()
async def test_a_batch_is_weighed_by_all_of_its_prompts(world: World) -> None:
    """Its first one would be cheaper here."""
    await world.tell(entry("other", prefixes=6))
    world.engines.open([request("a", [9] * 20), request("b"), request("c")])
    await world.settle()
    assert len(world.joins["other"][0].requests) == 3
    assert world.engines._peers["other"].mine.num_waiting_tokens == 20 + len(PROMPT) - 6 * 16
    assert set(HASHES) <= world.engines._peers["other"].candidate().prefixes


@world()
async def test_who_asks_in_between_changes_nothing(world: World) -> None:
    assert world.engines.own is not None
    world.engines.own.stats = EngineStats(num_waiting_tokens=50)
    await world.engines.describe("tiny")
    assert (await world.engines.entry("tiny")).num_waiting_tokens == 0
    assert (await world.engines.describe("tiny")).num_waiting_tokens == 50


@world(has_own=False)
async def test_the_only_engine_is_joined_again_when_its_replica_says_it_lives(
    world: World,
) -> None:
    engines.NOTICED_S, before = 0.0, engines.NOTICED_S
    world.attached = ["x", "x"]
    await world.engines.ready()
    world.engines.open([request("a")])
    await world.settle()
    world.joins["x"][0].die(DEATH)  # or it had not heard of this replica for long
    await world.settle()
    assert list(world.joins["x"][1].requests) == ["a"]
    engines.NOTICED_S = before
