"""Fixtures of the whole suite: one Ray cluster, and one served tiny model, per session."""

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from hypothesis import settings
from openai import OpenAI

from kernels import cpu
from kernels.gpu import interpreted
from tests.background import Background, computing

if TYPE_CHECKING:
    from ray._private.node import Node as ClusterNode
    from ray.cluster_utils import Cluster

settings.register_profile("manta", deadline=None)  # machines that run tests are busy
settings.load_profile("manta")

# Ray reads these when it is imported, which must therefore wait until here.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
os.environ.setdefault("RAY_metrics_report_interval_ms", "500")  # 10 s is long to wait for
os.environ.setdefault("RAY_SERVE_STATUS_GAUGE_REPORT_INTERVAL_S", "1")  # as is this
# torch too: tiny tensors gain nothing from threads, and spinning pools cost 2.5 times the CPU. It
# is imported here already, so that the variable is for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Their files run in processes of their own: tests/test_interpreter.py.
collect_ignore = [] if interpreted() else ["interpreted"]

BACKGROUND = pytest.StashKey[Background]()
MODEL_NAME = "tiny"
SESSION_LEN = 512
NUM_BLOCKS = 256


@pytest.fixture(scope="session", autouse=True)
def caches() -> Iterator[None]:
    """Nothing is read from or left in the user's caches; Ray's processes inherit this."""
    with tempfile.TemporaryDirectory(prefix="manta-caches-") as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is computed in the background is looked at last."""
    items.sort(key=lambda item: bool(_asked(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    chosen = [] if session.config.option.collectonly else session.items
    with computing([params for item in chosen if (params := _asked(item))]) as background:
        session.stash[BACKGROUND] = background
        return (yield)


def _asked(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a test whose work is done in the background."""
    if isinstance(item, pytest.Function) and "background" in item.fixturenames:
        return item.callspec.params
    return {}


@pytest.fixture
def background(request: pytest.FixtureRequest) -> Background:
    return request.session.stash[BACKGROUND]


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launcher with its compiled kernel and, as on CPUs that have none, without."""
    if request.param == "torch":
        monkeypatch.setattr("kernels.cpu.library", lambda: None)
        monkeypatch.setattr("kernels.int4_linear.library", lambda: None)
    elif cpu.library() is None:
        pytest.skip("no AMX, or installed without a compiler")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory that looks like a checkpoint as far as a plan looks."""
    path = tmp_path / "some-model-awq"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> "Iterator[Cluster]":
    """A cluster of our own, whatever else runs on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    # Nobody reads its logs, and the monitor of them takes 4 % of a processor.
    head = {"num_cpus": 4, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def add_node(ray_cluster: "Cluster") -> "Iterator[Callable[..., ClusterNode]]":
    """Starts a further node, which leaves after the test: `add_node(num_cpus=1, resources=…)`."""
    nodes: list[ClusterNode] = []

    def add(**options: Any) -> "ClusterNode":
        nodes.append(ray_cluster.add_node(**options))
        return nodes[-1]

    yield add
    for node in set(nodes) & ray_cluster.worker_nodes:  # a test may have removed it
        ray_cluster.remove_node(node)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer, in float32: greedy answers are exact."""
    from tests.tiny_models import write_servable_model

    path = tmp_path_factory.mktemp("served") / "tiny-llama"
    write_servable_model("llama", path, max_position_embeddings=SESSION_LEN)
    return path


@pytest.fixture(scope="session")
def base_url(ray_cluster: None, tiny_checkpoint: Path) -> Iterator[str]:
    """The running application, on Ray Serve's default proxy."""
    from ray import serve

    from serve_app.app import build_app
    from serve_app.app_args import AppArgs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    engine = {
        "model": str(tiny_checkpoint),
        "dtype": "float32",
        "device": "cpu",
        "cache_max_entry_count": NUM_BLOCKS,
        "max_waiting_requests": 200,
        "max_num_seqs": 64,
        "num_threads": 1,
    }
    args = AppArgs(engine=engine, model_name=MODEL_NAME, max_body_bytes=1024 * 1024)
    serve.run(build_app(args), name="tiny", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client
