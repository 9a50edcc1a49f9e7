"""Engines used by other replicas, with real actors and real kills: no token is lost or changed.

Two "replicas" are two AsyncEngines in this process, each with an engine of its own; the consumer
that dies is a process of its own.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable
from typing import Any

import pytest
import ray

from engine.errors import EngineDeadError
from engine.outputs import SequenceOutput
from engine.ray_group import EngineGroup
from engine.ray_remote import EngineRef, RemoteGroup, reference
from serve_app.async_engine import AsyncEngine
from serve_app.engines import Engines
from serve_app.metrics import Metrics
from tests.test_engine import greedy, prompts, request
from tests.test_failover import in_rank, send
from tests.test_ray_group import config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
NUM_TOKENS = 60


async def collect(group: EngineGroup, *names: str) -> dict[str, SequenceOutput]:
    outputs: dict[str, SequenceOutput] = {}
    while not all(name in outputs and outputs[name].finish_reason for name in names):
        for output in (await group.poll())[0]:
            earlier = outputs.setdefault(output.request_id, output)
            if earlier is not output:
                earlier.merge(output)
    return outputs


def test_owner_and_guests_share_an_engine() -> None:
    async def run() -> None:
        owner = await EngineGroup.start(config())
        guests = [RemoteGroup(reference(owner)) for _ in range(2)]
        groups = [owner, *guests]
        for index in range(len(prompts())):
            group = groups[index % 3]
            await group.submit([request(str(index), prompts()[index])])
        names = [[str(i) for i in range(len(prompts())) if i % 3 == g] for g in range(3)]
        found = await asyncio.gather(
            *(collect(group, *mine) for group, mine in zip(groups, names, strict=True))
        )
        for outputs, mine in zip(found, names, strict=True):
            assert sorted(outputs) == sorted(mine)
            assert all(outputs[name].token_ids == greedy(int(name)) for name in mine)
        guests[0].stop()
        await guests[1].submit([request("again", prompts()[3])])
        assert (await collect(guests[1], "again"))["again"].token_ids == greedy(3)
        owner.stop()
        with pytest.raises(EngineDeadError):
            await guests[1].poll()

    asyncio.run(run())


@ray.remote(num_cpus=0)
class Consumer:
    """A replica that submits to somebody's engine and then does not live long."""

    async def submit(self, engine: EngineRef) -> int:
        self._group = RemoteGroup(engine)
        await self._group.submit([request("orphan", prompts()[4], max_tokens=80, ignore_eos=True)])
        self._polling = asyncio.ensure_future(self._group.poll())
        return os.getpid()


def test_a_killed_consumer_s_sequences_end() -> None:
    """And until then they hold up nobody."""

    async def run() -> None:
        owner = await EngineGroup.start(config())

        def hurry(actor: Any) -> None:
            import time

            import engine.pollers

            engine.pollers.POLL_S = engine.pollers.SILENCE_S = 0.3  # type: ignore[assignment]
            step = actor._running()._engine.step

            def slow_step() -> Any:
                time.sleep(0.1)
                return step()

            actor._running()._engine.step = slow_step

        await in_rank(owner, 0, hurry)
        consumer: Any = Consumer.remote()  # type: ignore[attr-defined]
        os.kill(await consumer.submit.remote(reference(owner)), signal.SIGKILL)
        await owner.submit([request("mine", prompts()[3])])
        assert (await collect(owner, "mine"))["mine"].token_ids == greedy(3)

        def num_free(actor: Any) -> tuple[int, bool]:
            engine = actor._running()._engine
            return engine.scheduler.block_manager.num_free_blocks, engine.has_work

        async with asyncio.timeout(6):  # 80 steps of the orphan alone would take 8 s
            while (await in_rank(owner, 0, num_free)) != (200, False):
                await asyncio.sleep(0.05)
        owner.stop()

    asyncio.run(run())


class Replica:
    """An own engine and what a replica knows of another one."""

    def __init__(self, name: str, own: AsyncEngine) -> None:
        self.own = own
        self.engines = Engines(
            replica_id=name,
            version="1",
            config=config(),
            metrics=own._metrics,
            join=RemoteGroup,
            refer=reference,
            own=own,
        )

    @classmethod
    async def start(cls, name: str) -> "Replica":
        group = await EngineGroup.start(config())
        metrics = Metrics(name, 128)
        engine = AsyncEngine(group, lambda: EngineGroup.start(config()), config(), metrics)
        return cls(name, engine)

    async def answer(self, index: int, name: str, session_id: str) -> list[int]:
        settings: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        if index % 2:
            settings |= {"temperature": 1.0, "seed": index}
        opened = self.engines.open([request(name, prompts()[index], **settings)], session_id)
        token_ids: list[int] = []
        while opened.unfinished:
            for _, output in await opened.take():
                assert output.error is None
                token_ids += output.token_ids
        self.engines.close(opened)
        return token_ids


async def meet(*replicas: Replica) -> None:
    entries = [await each.engines.describe("tiny") for each in replicas]
    for each in replicas:
        others = [entry for entry in entries if entry.replica_id != each.engines._replica_id]
        each.engines.update(others)


async def ask(replica: Replica, run: str) -> list[list[int]]:
    """Answers to every prompt, of sessions that live here and there."""
    answers: list[Awaitable[list[int]]] = [
        replica.answer(index, f"{run}-{index}", f"session {index}")
        for index in range(len(prompts()) - 2)
    ]
    return await asyncio.gather(*answers)


@pytest.mark.parametrize("victim", ["engine", "replica"])
def test_streams_go_on_when_another_replica_s_engine_dies(victim: str) -> None:
    """Killed outright, and restarted by its replica, or gone together with its replica."""

    async def run() -> None:
        near, far = await asyncio.gather(Replica.start("near"), Replica.start("far"))
        undisturbed = await ask(near, "undisturbed")
        assert near.engines.num_open == 0
        await meet(near, far)
        asking = asyncio.ensure_future(ask(near, "disturbed"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < near.own.num_open < near.engines.num_open  # some here, some there
        while not (guests := near.engines._guests) or not any(
            len(sequence.token_ids) > 5
            for guest in guests.values()
            for sequence in guest._sequences.values()
        ):
            await asyncio.sleep(0.001)
        group = far.own.group
        assert group is not None
        if victim == "engine":
            await send(group, 0, signal.SIGKILL)
        else:
            far.engines.stop()
        assert not asking.done()
        assert await asking == undisturbed
        near.engines.stop()
        far.engines.stop()

    asyncio.run(asyncio.wait_for(run(), 100))
