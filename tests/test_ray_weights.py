"""A node that joins takes packed weights from another one, over a real cluster."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import ray
import torch
from ray import serve
from ray.experimental.internal_kv import _internal_kv_list
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.config import EngineConfig
from engine.outputs import SequenceOutput
from engine.ray_actor import EngineActor
from engine.ray_weights import NAMESPACE, PIECE_BYTES, RayPeer, RayPeers
from engine.tokenizer import Tokenizer
from engine.weights.cache import WeightCache
from engine.weights.cache_entry import Key
from engine.weights.origin import Origin
from engine.weights.peers import Parcel, Piece
from serve_app.app import build_app
from serve_app.app_args import AppArgs
from tests.conftest import MODEL_NAME
from tests.test_engine import greedy, prompts, request
from tests.test_weight_cache import DEADLINE_S, KEY, NO_LIMIT
from tests.test_weight_peers import no_checkpoint
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from ray._private.node import Node as ClusterNode
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def joining(
    ray_cluster: "Cluster", tmp_path_factory: pytest.TempPathFactory
) -> Iterator["ClusterNode"]:
    """A node with caches of its own."""
    caches = str(tmp_path_factory.mktemp("joining"))
    node = ray_cluster.add_node(num_cpus=8, env_vars={"XDG_CACHE_HOME": caches})
    yield node
    ray_cluster.remove_node(node)


def config(model: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        dtype="float32",
        device="cpu",
        num_threads=1,
        block_size=4,
        cache_max_entry_count=64,
    )


def start(node_id: str, config: EngineConfig) -> Any:
    """An engine on that node, and the call that starts it."""
    remote: Any = ray.remote(EngineActor)
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = remote.options(num_cpus=0, scheduling_strategy=affinity).remote(config, 0)
    return actor, actor.start.remote()


def answer(actor: Any, index: int) -> list[int]:
    ray.get(actor.submit.remote([request("r", prompts()[index])]), timeout=DEADLINE_S)
    token_ids: list[int] = []
    while True:
        output: SequenceOutput
        for output in ray.get(actor.poll.remote(), timeout=DEADLINE_S)[0]:
            token_ids += output.token_ids
            if output.finish_reason:
                return token_ids


def head_id() -> str:
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_engines_start_on_a_node_without_the_checkpoint(
    joining: "ClusterNode", tmp_path: Path
) -> None:
    """Two at once; the path to the checkpoint is gone, as where it never was."""
    model = tmp_path / "model"
    model.symlink_to(tiny_model("llama").path)
    first, started = start(head_id(), config(model))
    ray.get(started, timeout=DEADLINE_S)
    peers = RayPeers(str(model), tmp_path)
    wait_for(lambda: bool(peers._announced()))
    model.unlink()
    engines = [start(joining.node_id, config(model)) for _ in range(2)]
    for actor, started in engines:
        ray.get(started, timeout=DEADLINE_S)
        assert answer(actor, 3) == greedy(3)
    wait_for(lambda: len(peers._announced()) == 2)
    ray.kill(first)
    for actor, _ in engines:
        ray.kill(actor)


def test_a_replica_serves_where_the_checkpoint_is_not(
    joining: "ClusterNode", base_url: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Its tokenizer comes along; no engine runs any more where the file was made."""
    model = tmp_path / "model"
    model.symlink_to(tiny_checkpoint)
    engine = {"model": str(model), "dtype": "float32", "device": "cpu", "num_threads": 1}
    # The head has 4 CPUs.
    args = AppArgs(engine=engine | {"session_len": 128}, model_name=MODEL_NAME, cpus_per_rank=5)
    app = build_app(args)
    first, started = start(head_id(), args.engine_config())
    ray.get(started, timeout=DEADLINE_S)
    wait_for(lambda: bool(RayPeers(str(model), tmp_path)._announced()))
    ray.kill(first)
    model.unlink()
    serve.run(app, name="joined", route_prefix="/joined")
    try:
        body = {"model": MODEL_NAME, "prompt": "The quick", "temperature": 0, "max_tokens": 8}
        texts = {
            httpx.post(f"{base_url}{prefix}/v1/completions", json=body, timeout=60).json()[
                "choices"
            ][0]["text"]
            for prefix in ("", "/joined")
        }
        assert len(texts) == 1
        nodes = {node for node, _ in RayPeers(str(model), tmp_path)._announced()}
        assert nodes == {head_id(), joining.node_id}
    finally:
        serve.delete("joined")


def announcer(model: Path, checkpoint: Path, directory: Path, node_id: str) -> RayPeers:
    """A node that has the checkpoint elsewhere, so that `model` is missing on all others."""
    peers = RayPeers(str(model), directory)
    peers._node, peers._origin = node_id, Origin.at(checkpoint)
    return peers


def test_a_replica_finds_its_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, joining = tmp_path / "model", tmp_path / "joining"
    announcer(model, tiny_checkpoint, tmp_path, head_id())._announce(tmp_path / "a.safetensors")
    for _ in range(2):  # the second finds the copies
        origin = RayPeers(str(model), joining).origin(model)
        assert not origin.here
        assert origin.checkpoint == str(tiny_checkpoint)
        found, expected = Tokenizer.load(origin.settings), Tokenizer.load(tiny_checkpoint)
        assert found.encode("The quick") == expected.encode("The quick")
        (settings,) = joining.iterdir()
        assert settings == origin.settings


def test_the_version_last_read_is_the_one_that_counts(
    ray_cluster: "Cluster", tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    for version, seen in (("old", 10.0), ("new", 30.0), ("older", 5.0)):
        checkpoint = tmp_path / version
        shutil.copytree(tiny_checkpoint, checkpoint)
        peers = announcer(model, checkpoint, tmp_path, head_id())
        peers._seen = seen
        peers._announce(tmp_path / f"{version}.safetensors")
    joining = RayPeers(str(model), tmp_path / "joining")
    assert joining.origin(model).checkpoint == str(tmp_path / "new")
    assert joining._seen == 30.0  # not made newer by being copied


def test_what_a_dead_node_had_is_forgotten(ray_cluster: "Cluster", tmp_path: Path) -> None:
    announcer(tmp_path, tmp_path, tmp_path, "dead")._announce(tmp_path / "m.safetensors")
    assert len(_internal_kv_list(f"{tmp_path}\n", namespace=NAMESPACE)) == 1
    assert list(RayPeers(str(tmp_path), tmp_path).holding("m")) == []
    assert _internal_kv_list(f"{tmp_path}\n", namespace=NAMESPACE) == []


@dataclass
class KilledMidway:
    """A peer whose sending process is killed after one piece."""

    peer: RayPeer
    raylet: int
    killed: bool = False

    @property
    def address(self) -> str:
        return self.peer.address

    @contextmanager
    def send(self, key: Key) -> Iterator[Parcel]:
        with self.peer.send(key) as parcel:
            yield Parcel(parcel.manifest, self._pieces(parcel.pieces))

    def _pieces(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        yield next(pieces)
        (pid,) = children(self.raylet, b"ray::_send_file")
        os.kill(pid, signal.SIGKILL)
        self.killed = True
        yield from pieces


def children(parent: int, title: bytes) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            titled = (stat.parent / "cmdline").read_bytes().startswith(title)
            if titled and int(stat.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def test_a_sender_killed_midway(
    joining: "ClusterNode", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file comes from the next peer; the first one's pieces leave nothing."""
    table = torch.arange(6 * PIECE_BYTES // 8)  # more pieces than wait in object stores
    WeightCache(tmp_path / "other", NO_LIMIT).load("m", KEY, lambda: [("table", table)])
    data = tmp_path / "other" / "m.safetensors"
    for node_id in (head_id(), joining.node_id):
        announcer(tmp_path, tmp_path, tmp_path, node_id)._announce(data)
    peers = RayPeers(str(tmp_path), tmp_path / "cache")
    peers._node = "neither of them"
    peers._origin = Origin.at(tmp_path)
    raylet = joining.all_processes["raylet"][0].process.pid
    by_node = {peer.address: peer for peer in peers.holding("m")}
    killed = KilledMidway(by_node[joining.node_id], raylet)
    monkeypatch.setattr(peers, "holding", lambda name: iter([killed, by_node[head_id()]]))
    found = WeightCache(tmp_path / "cache", NO_LIMIT, peers).load("m", KEY, no_checkpoint)
    assert killed.killed
    assert torch.equal(found["table"], table)  # type: ignore[arg-type]
