"""Site: a Ray cluster of several nodes on loopback that serves the tiny model, and its processes.

Ray reads its environment when it is imported: set it before this module is.
"""

import asyncio
import contextlib
import copy
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client

from engine.outputs import EngineStats
from serve_app import serve_instance
from serve_app.launch_plan import make_plan
from serve_app.processes import started_with
from serve_app.serve_config import DEPLOYMENT
from serve_app.serve_schema import to_schema

RECOVERY_S = 90
NODE_CPUS = 2  # tickets: four replicas of tp=1


class NotRecoveredError(Exception):
    """The application did not come back."""


class Site:
    """Two replicas at first. Everything it starts names its run directory in the environment."""

    def __init__(
        self, checkpoint: Path, run_dir: Path, *, num_nodes: int, tp: int, placement: str
    ) -> None:
        self.plan = make_plan(
            model=str(checkpoint),
            model_name="tiny",
            port=0,
            num_replicas=2,
            tp=tp,
            placement=placement,
            dtype="float32",
            device="cpu",
            num_threads=1,
            cache_max_entry_count=1200,
            step_timeout_s=4,
        )
        self.url = f"http://127.0.0.1:{self.plan.port}"
        self._run_dir = run_dir
        self._config = copy.deepcopy(self.plan.serve_config)
        self._tp = tp
        head = {"num_cpus": 1, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(
            self._cluster.address,
            namespace="serve",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        for _ in range(num_nodes):
            self.add_node()
        self._proxies = serve_instance.deploy(to_schema(self._config), self.plan, None)

    # -- what Serve is told -----------------------------------------------------------------------

    @property
    def deployment(self) -> dict[str, Any]:
        """The deployment's options in the Serve config."""
        entry: dict[str, Any] = self._config["applications"][0]["deployments"][0]
        return entry

    @property
    def engine(self) -> dict[str, Any]:
        settings: dict[str, Any] = self._config["applications"][0]["args"]["engine"]
        return settings

    def deploy(self) -> None:
        """Apply the config as `serve deploy` does."""
        client: Any = _get_global_client()
        client.deploy_apps(to_schema(copy.deepcopy(self._config)))

    async def recovered(self) -> None:
        """Until all replicas run, with the last config, and a request is answered."""
        await self._until(self._is_whole, "the application")
        async with httpx.AsyncClient(timeout=5) as client:

            async def answers() -> bool:
                with contextlib.suppress(httpx.HTTPError):
                    return (await client.get(f"{self.url}/health")).status_code == 200
                return False

            await self._until(answers, "the proxy")

    async def _is_whole(self) -> bool:
        def ask() -> bool:
            app = serve.status().applications[self.plan.app_name]
            (deployment,) = app.deployments.values() or [None]
            if deployment is None or app.status != "RUNNING" or deployment.status != "HEALTHY":
                return False
            return deployment.replica_states == {"RUNNING": self.deployment["num_replicas"]}

        return await asyncio.to_thread(ask)

    async def _until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + RECOVERY_S
        while not await condition():
            if time.monotonic() > deadline:
                raise NotRecoveredError(f"{what} did not come back: {serve.status()}")
            await asyncio.sleep(0.1)

    # -- nodes and processes ----------------------------------------------------------------------

    def add_node(self) -> None:
        self._cluster.add_node(num_cpus=NODE_CPUS)

    def kill_node(self, index: int) -> None:
        """A worker's raylet and all that it started, with SIGKILL."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))
        self._cluster.remove_node(nodes[index % len(nodes)], allow_graceful=False)

    def pids(self, kind: str) -> list[int]:
        """Of living actors whose class name contains `kind`, in Ray's order of their ids."""
        found = [a for a in actors().values() if a["State"] == "ALIVE"]
        return [int(a["Pid"]) for a in found if kind in a["ActorClassName"]]

    def haproxy_pids(self) -> list[int]:
        return [pid for pid, name in started_with(self._run_dir).items() if "haproxy" in name]

    def kill(self, pid: int, signum: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):  # another fault was faster
            os.kill(pid, signum)

    # -- what must not be there in the end --------------------------------------------------------

    def engine_stats(self) -> list[tuple[int, EngineStats]]:
        """Of each replica: open sequences, and the engine's last report."""
        found = []
        for name in ray.util.list_named_actors(all_namespaces=True):
            if name["name"].startswith("SERVE_REPLICA::"):
                actor: Any = ray.get_actor(**name)
                found.append(ray.get(actor.__ray_call__.remote(_engine_stats)))
        return found

    def leaks(self) -> list[str]:
        """Of a site that nobody asks anything any more."""
        wanted = self.deployment["num_replicas"]
        found = []
        for kind, count in ((DEPLOYMENT, wanted), ("EngineActor", wanted * self._tp)):
            if (living := len(self.pids(kind))) != count:
                found.append(f"{living} actors of {kind} instead of {count}")
        for num_open, stats in self.engine_stats():
            if num_open or stats.num_running or stats.num_waiting or stats.kv_cache_usage:
                found.append(f"{num_open} open sequences, {stats}")
        return found

    def close(self) -> list[str]:
        """End all of it. What is left: processes, and shared memory they had mapped."""
        memory = _shared_memory(list(started_with(self._run_dir)))
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        self._cluster.shutdown()  # type: ignore[no-untyped-call]
        deadline = time.monotonic() + 20
        while (left := started_with(self._run_dir)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [*left.values(), *filter(os.path.exists, memory)]


def _engine_stats(actor: Any) -> tuple[int, EngineStats]:
    engine = actor._replica_impl._user_callable_wrapper._callable._own
    return engine.num_open, engine.stats


def _shared_memory(pids: list[int]) -> set[str]:
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {line.split(None, 5)[5] for line in lines if "/dev/shm/" in line}
    return {path for path in found if not path.endswith("(deleted)")}
