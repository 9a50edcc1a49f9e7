"""What each rank's actor asks of Ray: its part of the owner's placement group, or of the cluster.

The owner's bundle is the first one; the others are equal, and hold one rank or one stage each.
"""

import asyncio
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.config import EngineConfig
from engine.rank_places import order_slots


async def rank_options(config: EngineConfig) -> list[dict[str, Any]]:
    """Options of each rank's actor, the same as long as the bundles stay where they are."""
    placement = get_current_placement_group()
    # Asks Ray's head node, and the caller's loop has streams to serve.
    return await asyncio.to_thread(_options, config, placement)


def _options(config: EngineConfig, placement: PlacementGroup | None) -> list[dict[str, Any]]:
    if placement is None:
        has_gpus = False
        if config.device != "cpu":
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            has_gpus = resources.get("GPU", 0) >= config.num_ranks
        return [{"num_cpus": 0, "num_gpus": int(has_gpus)}] * config.num_ranks
    bundles = placement.bundle_specs
    nodes = placement_group_table(placement)["bundles_to_node_id"]
    share = config.num_ranks // (len(bundles) - 1)  # ranks of a bundle
    slots = [index for index in range(1, len(bundles)) for _ in range(share)]
    order = order_slots([nodes[index] for index in slots], nodes[0], config.tp)
    return [
        {
            "num_cpus": bundles[index].get("CPU", 0) / share,
            "num_gpus": bundles[index].get("GPU", 0) / share,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement, placement_group_bundle_index=index
            ),
        }
        for index in (slots[slot] for slot in order)
    ]
