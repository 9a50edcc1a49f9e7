"""What a replica asks of Ray for its ranks, and what is said when no cluster like this has it."""

from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from serve_app.app_args import AppArgs
from serve_app.placement import Placement, with_device

GPU_NODE = {"CPU": 16.0, "GPU": 8.0, "memory": 1e11}
HEAD = {"CPU": 4.0}


def placement(**engine: Any) -> Placement:
    config = EngineConfig.from_dict({"model": "m", "device": "cuda"} | engine)
    return Placement.of(config, AppArgs(engine={}))


def test_a_rank_a_bundle_or_a_stage_a_bundle() -> None:
    rank = {"CPU": 1.0, "GPU": 1.0}
    for name, strategy in (("node", "STRICT_PACK"), ("ranks", "PACK")):
        asked = placement(tp=2, pp=2, placement=name)
        assert asked.bundles == [{"CPU": 1.0}, rank, rank, rank, rank]
        assert asked.strategy == strategy
    stages = placement(tp=8, pp=2, placement="stages")
    assert stages.bundles == [{"CPU": 1.0}, *[{"CPU": 8.0, "GPU": 8.0}] * 2]
    assert stages.strategy == "PACK"
    with pytest.raises(ConfigError, match="placement must be one of node, stages, ranks"):
        placement(placement="PACK")


@pytest.mark.parametrize(
    ("engine", "nodes"),
    [
        ({"tp": 8}, [HEAD, GPU_NODE]),
        ({"tp": 16, "placement": "ranks"}, [HEAD, GPU_NODE, GPU_NODE]),
        ({"tp": 8, "pp": 2, "placement": "stages"}, [HEAD, GPU_NODE, GPU_NODE]),
        ({"tp": 2, "device": "cpu"}, [{"CPU": 2.0}]),
        ({"tp": 3, "device": "cpu", "placement": "stages"}, [{"CPU": 1.2}, {"CPU": 0.2}]),
    ],
)
def test_what_fits(engine: dict[str, Any], nodes: list[dict[str, float]]) -> None:
    assert placement(**engine).obstacle(nodes) is None


@pytest.mark.parametrize(
    ("engine", "nodes", "reason"),
    [
        (
            {"tp": 16},
            [HEAD, GPU_NODE, GPU_NODE],
            "no node has 17 CPU and 16 GPU for all ranks (the largest of 3 has 16 CPU and 8 GPU); "
            "lower tp or pp, add a node, or let the engine span nodes (placement: stages, or "
            "ranks)",
        ),
        (
            {"tp": 16, "placement": "stages"},
            [GPU_NODE, GPU_NODE],
            "the nodes have room for 0 of 1 times 16 CPU and 16 GPU (the largest of 2 has 16 CPU "
            "and 8 GPU); lower tp or pp, or add nodes",
        ),
        (
            {"tp": 24, "placement": "ranks"},
            [HEAD, GPU_NODE, GPU_NODE],
            "the nodes have room for 16 of 24 times 1 CPU and 1 GPU",
        ),
        ({"tp": 1}, [HEAD], "(the largest of 1 has 4 CPU and 0 GPU)"),
        ({"tp": 1}, [], "the cluster has no node"),
    ],
)
def test_what_never_fits(
    engine: dict[str, Any], nodes: list[dict[str, float]], reason: str
) -> None:
    assert reason in str(placement(**engine).obstacle(nodes))


def test_the_device_follows_the_cluster_s_gpus() -> None:
    config = EngineConfig(model="m", tp=2, pp=2)
    assert [with_device(config, count).device for count in (3, 4)] == ["cpu", "cuda"]
    assert with_device(EngineConfig(model="m", device="cpu"), 8).device == "cpu"
