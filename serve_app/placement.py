"""Placement: the bundles of resources one replica and its ranks ask of Ray, and whether a cluster
can ever have them. Pure: what the nodes have is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.config import EngineConfig
from serve_app.app_args import ModelArgs

# On a CPU, shares of one core's ticket: tp=2 must fit a machine with two cores.
CPU_REPLICA, CPU_RANK = 0.1, 0.4
GPU_REPLICA, GPU_RANK = 1.0, 1.0

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Placement:
    """A placement group: the replica's bundle, then those of the ranks, which are alike.

    A bundle is never split over nodes: with `placement: stages` it holds all ranks of a stage.
    """

    replica: dict[str, float]
    bundle: dict[str, float]
    num_bundles: int
    one_node: bool

    @classmethod
    def of(cls, config: EngineConfig, args: ModelArgs) -> "Placement":
        """`config.device` must be known: cpu or cuda."""
        on_gpu = config.device == "cuda"
        rank = {"CPU": args.cpus_per_rank or (GPU_RANK if on_gpu else CPU_RANK)}
        if on_gpu:
            rank["GPU"] = 1.0
        per_bundle = config.tp if config.placement == "stages" else 1
        return cls(
            replica={"CPU": args.cpus_per_replica or (GPU_REPLICA if on_gpu else CPU_REPLICA)},
            bundle={name: amount * per_bundle for name, amount in rank.items()},
            num_bundles=config.num_ranks // per_bundle,
            one_node=config.placement == "node",
        )

    @property
    def bundles(self) -> list[dict[str, float]]:
        return [self.replica, *[self.bundle] * self.num_bundles]

    @property
    def strategy(self) -> str:
        return "STRICT_PACK" if self.one_node else "PACK"

    def obstacle(self, nodes: Sequence[Resources]) -> str | None:
        """Why nodes with these resources, were they idle, could not hold it; None: they can."""
        if self.one_node:
            whole = _sum(self.bundles)
            if any(_fits(whole, node) for node in nodes):
                return None
            return (
                f"no node has {_say(whole)} for all ranks ({_largest(whole, nodes)}); lower tp or "
                "pp, add a node, or let the engine span nodes (placement: stages, or ranks)"
            )
        room = sum(_count(self.bundle, node) for node in nodes)
        if room >= self.num_bundles and any(_fits(self.replica, node) for node in nodes):
            return None
        return (
            f"the nodes have room for {room} of {self.num_bundles} times {_say(self.bundle)} "
            f"({_largest(self.bundle, nodes)}); lower tp or pp, or add nodes"
        )


def with_device(config: EngineConfig, num_gpus: float) -> EngineConfig:
    """`auto` becomes cuda when the cluster has a GPU for every rank."""
    if config.device != "auto":
        return config
    return replace(config, device="cuda" if num_gpus >= config.num_ranks else "cpu")


def _sum(bundles: Sequence[Resources]) -> dict[str, float]:
    names = {name for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in sorted(names)}


def _count(wanted: Resources, node: Resources) -> int:
    """How many times `wanted` fits; Ray counts in 1/10000."""
    return min(int(node.get(name, 0.0) / amount + 1e-4) for name, amount in wanted.items())


def _fits(wanted: Resources, node: Resources) -> bool:
    return _count(wanted, node) > 0


def _say(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _largest(wanted: Resources, nodes: Sequence[Resources]) -> str:
    """What the node with the most of the scarcest resource has of what is wanted."""
    if not nodes:
        return "the cluster has no node"
    scarce = "GPU" if "GPU" in wanted else "CPU"
    node = max(nodes, key=lambda each: each.get(scarce, 0.0))
    return f"the largest of {len(nodes)} has {_say({name: node.get(name, 0) for name in wanted})}"
