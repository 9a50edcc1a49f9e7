"""Engines whose ranks are on several Ray nodes give the tokens of one rank."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDeadError
from engine.ray_actor import RankInfo
from engine.ray_group import EngineGroup, _all, _check_devices
from tests.test_engine import greedy, prompts
from tests.test_failover import SETTINGS, assert_same, disturbed, fault, mixed_bodies
from tests.test_failover import answers as answers_of
from tests.test_ray_group import answers, config
from tests.test_replica import RunningReplica

if TYPE_CHECKING:
    from ray._private.node import Node as ClusterNode

EAST, WEST = {"CPU": 1, "east": 1}, {"CPU": 1, "west": 1}
Placed = list[tuple[str, int]]  # node and pid of each rank


@ray.remote
class Owner:
    """Holds an engine as a replica does: from bundle 0 of its placement group."""

    async def start(self, config: EngineConfig) -> Placed:
        self.group = await EngineGroup.start(config)
        ranks: Any = self.group._actors
        return [await rank.__ray_call__.remote(_where) for rank in ranks]

    async def answers(self) -> list[list[int]]:
        outputs = await answers(self.group)
        return [outputs[str(index)].token_ids for index in range(len(outputs))]


def _where(actor: object) -> tuple[str, int]:
    import os

    return ray.get_runtime_context().get_node_id(), os.getpid()


def all_greedy() -> list[list[int]]:
    """What transformers answers."""
    return [greedy(index) for index in range(len(prompts()))]


@pytest.fixture
def nodes(add_node: "Callable[..., ClusterNode]") -> dict[str, str]:
    """Two nodes beside the head, by the resource that only they have."""
    return {name: add_node(num_cpus=3, resources={name: 3}).node_id for name in ("east", "west")}


@pytest.fixture
def owner() -> Iterator[Callable[..., Any]]:
    """Starts an Owner in bundle 0 of a placement group; `owner([…], strategy)`."""
    started: list[Any] = []

    def start(bundles: list[dict[str, float]], strategy: str = "PACK") -> Any:
        group = placement_group(bundles, strategy=strategy)
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        remote: Any = Owner
        handle = remote.options(num_cpus=0, scheduling_strategy=place).remote()
        started.append((handle, group))
        return handle

    yield start
    for handle, group in started:
        ray.kill(handle)
        remove_placement_group(group)


@pytest.mark.ray
def test_two_ranks_on_two_nodes(nodes: dict[str, str], owner: Callable[..., Any]) -> None:
    """The owner is in the west, so rank 0 is too."""
    handle = owner([{"CPU": 1, "west": 1}, EAST, WEST])
    placed = ray.get(handle.start.remote(config(tp=2, num_threads=None)))
    assert [node for node, _ in placed] == [nodes["west"], nodes["east"]]
    assert ray.get(handle.answers.remote()) == all_greedy()


@pytest.mark.ray
def test_stages_of_two_ranks_on_a_node_each(
    nodes: dict[str, str], owner: Callable[..., Any]
) -> None:
    """A bundle per stage."""
    handle = owner([{"CPU": 1, "west": 1}, {"CPU": 2, "east": 1}, {"CPU": 2, "west": 1}])
    placed = ray.get(handle.start.remote(config(tp=2, pp=2)))
    assert [node for node, _ in placed] == [nodes["west"]] * 2 + [nodes["east"]] * 2
    assert ray.get(handle.answers.remote()) == all_greedy()


@pytest.mark.ray
def test_streams_outlive_a_rank_of_any_stage(ray_cluster: None, tiny_checkpoint: Path) -> None:
    running = RunningReplica(tiny_checkpoint, pp=2, **SETTINGS)
    undisturbed = running.run(answers_of(running, mixed_bodies(16, "undisturbed")))
    faults = {15: fault("killed", 1), 70: fault("killed", 0)}
    found = running.run(disturbed(running, mixed_bodies(16, "disturbed"), faults))
    assert_same(found, undisturbed)
    running.close()


def test_ranks_with_different_devices_are_refused() -> None:
    ranks = [RankInfo("a", "cuda", "10.0.0.1:5"), RankInfo("b", "cpu", "")]
    with pytest.raises(ConfigError, match=r"rank 0: cuda, rank 1: cpu.; set device: cpu or cuda"):
        _check_devices(ranks)
    _check_devices(ranks[:1])


def test_ranks_that_give_no_sign_are_named() -> None:
    async def reply(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def run() -> None:
        late = EngineDeadError("did not come")
        assert await _all([reply(0), reply(0)], 10, late) == [0, 0]
        with pytest.raises(EngineDeadError, match=r"engine rank 1, 2 did not come .waited 0\.1 s"):
            await _all([reply(0), reply(60), reply(60)], 0.1, late)

    asyncio.run(run())
