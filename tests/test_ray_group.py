"""Engine actors on a real Ray cluster: tp=1 and tp=2 give one answer; errors and deaths surface."""

import asyncio
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, EngineDeadError
from engine.outputs import SequenceOutput
from engine.ray_group import EngineGroup
from tests.test_engine import greedy, model, prompts, request

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def config(**changes: object) -> EngineConfig:
    values: dict[str, object] = {
        "model": str(model().path),
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "block_size": 4,
        "cache_max_entry_count": 200,
        "max_num_batched_tokens": 16,
    }
    return EngineConfig.from_dict(values | changes)


async def answers(group: EngineGroup) -> dict[str, SequenceOutput]:
    requests = [request(str(i), prompt) for i, prompt in enumerate(prompts())]
    await group.submit(requests[:5])
    await group.submit(requests[5:])
    outputs: dict[str, SequenceOutput] = {}
    while len(outputs) < len(requests) or not all(o.finish_reason for o in outputs.values()):
        for output in (await group.poll())[0]:
            earlier = outputs.setdefault(output.request_id, output)
            if earlier is not output:
                earlier.merge(output)
    return outputs


@pytest.mark.parametrize("tp", [1, 2])
def test_a_group_gives_the_tokens_of_transformers(tp: int) -> None:
    async def run() -> None:
        group = await EngineGroup.start(config(tp=tp))
        try:
            assert (group.info.tp, group.info.session_len) == (tp, 128)
            outputs = await answers(group)
            for index in range(len(prompts())):
                assert outputs[str(index)].token_ids == greedy(index)
            await group.check()
        finally:
            group.stop()

    asyncio.run(run())


def test_errors_of_loading_arrive_as_themselves(tmp_path: Path) -> None:
    async def run() -> None:
        with pytest.raises(CheckpointError, match="nowhere is not a directory"):
            await EngineGroup.start(config(model=str(tmp_path / "nowhere")))
        with pytest.raises(ConfigError, match="tp=3 does not fit"):
            await EngineGroup.start(config(tp=3))

    asyncio.run(run())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_noticed_at_once_while_idle(rank: int) -> None:
    async def run() -> None:
        import ray

        group = await EngineGroup.start(config(tp=2))
        try:
            poll = asyncio.ensure_future(group.poll())
            await asyncio.sleep(0)
            ray.kill(group._actors[rank])
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(poll, 20)
            with pytest.raises(EngineDeadError):
                await group.check()
        finally:
            group.stop()

    asyncio.run(run())
