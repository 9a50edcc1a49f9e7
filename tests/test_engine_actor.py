"""EngineActor's own code, in this process: one rank answers, another follows and stops."""

import asyncio
import threading
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineDeadError
from engine.executor import EngineInfo
from engine.outputs import SequenceOutput
from engine.ray_actor import EngineActor
from tests.test_engine import greedy, prompts, request
from tests.test_ray_group import config


async def collect(actor: EngineActor, name: str) -> SequenceOutput:
    """The whole output of a request that is alone."""
    (collected,), _ = await actor.poll()
    assert collected.request_id == name
    while collected.finish_reason is None:
        (output,), _ = await actor.poll()
        collected.merge(output)
    return collected


def test_one_rank_serves_aborts_and_refuses() -> None:
    async def run() -> None:
        actor = EngineActor(config(), 0)
        info = await actor.start()
        assert isinstance(info, EngineInfo)
        assert (info.tp, info.block_size, info.num_blocks, info.dtype) == (1, 4, 200, "float32")
        await actor.submit([request("a", prompts()[3])])
        assert (await collect(actor, "a")).token_ids == greedy(3)
        await actor.submit([request("b", [10**6])])
        refused = await collect(actor, "b")
        assert (refused.finish_reason, refused.token_ids) == ("error", [])
        await actor.submit([request("c", prompts()[4], max_tokens=60, ignore_eos=True)])
        await actor.abort(["c", "unknown"])
        await actor.submit([request("d", prompts()[5])])
        found: dict[str, SequenceOutput] = {}
        while (last := found.get("d")) is None or last.finish_reason is None:
            for output in (await actor.poll())[0]:
                earlier = found.setdefault(output.request_id, output)
                if earlier is not output:
                    earlier.merge(output)
        assert last.token_ids == greedy(5)
        await actor.check()
        actor._running().stop()

    asyncio.run(run())


def test_a_failed_step_is_told_to_who_polls_and_who_asks() -> None:
    async def run() -> None:
        actor = EngineActor(config(), 0)
        await actor.start()
        batcher = actor._running()
        del batcher._engine.executor  # the loop's next step finds nothing to compute with
        await actor.submit([request("a", prompts()[3])])
        with pytest.raises(EngineDeadError, match="AttributeError"):
            await actor.poll()
        with pytest.raises(EngineDeadError, match="AttributeError"):
            await actor.check()

    asyncio.run(run())


def test_what_cannot_be_loaded_fails_the_start(tmp_path: Path) -> None:
    actor = EngineActor(EngineConfig(model=str(tmp_path), device="cpu"), 0)
    with pytest.raises(CheckpointError):
        asyncio.run(actor.start())


def test_a_parked_call_waits_for_ever() -> None:
    async def run() -> None:
        parked = asyncio.ensure_future(EngineActor(config(), 0).park())
        done, _ = await asyncio.wait({parked}, timeout=0.05)
        assert not done
        parked.cancel()

    asyncio.run(run())


def test_the_loop_s_thread_is_one_of_ours() -> None:
    """It must not keep a process alive whose owner is gone."""
    before = set(threading.enumerate())

    async def run() -> None:
        actor = EngineActor(config(), 0)
        await actor.start()
        started = [thread for thread in threading.enumerate() if thread.name == "engine-loop"]
        assert all(thread.daemon for thread in set(started) - before)
        actor._running().stop()

    asyncio.run(run())
