"""`manta serve` on two nodes that `ray start` made, with an address of loopback each."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.ports import free_ports
from serve_app.processes import RUN_DIR, Guard
from tests.test_launch import BIN, DEMO, ROOT, START_S, _answer

pytestmark = pytest.mark.slow

HOSTS = ("127.0.0.2", "127.0.0.3")  # Ray would replace 127.0.0.1 by the machine's address
NODE_CPUS = 2
ANSWER = "2 + 3 = 5."


@dataclass(frozen=True)
class Nodes:
    environ: dict[str, str]
    pids: list[int]  # of the processes `ray start`
    port: int  # of Serve

    def ranks(self) -> list[int]:
        """How many engine processes each node has."""
        titles = {pid: title for pid, (_, title) in _processes().items()}
        return [
            sum("ray::EngineActor" in titles[pid] for pid in _descendants(node) & titles.keys())
            for node in self.pids
        ]


def _processes() -> dict[int, tuple[int, str]]:
    """pid → parent and command."""
    command = ["ps", "-eo", "pid=,ppid=,args="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split(maxsplit=2) for line in lines.splitlines())
    return {int(pid): (int(parent), args) for pid, parent, args in rows}


def _descendants(pid: int) -> set[int]:
    parents = {each: parent for each, (parent, _) in _processes().items()}
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {each for each, parent in parents.items() if parent in found}
    return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    address = f"{HOSTS[0]}:{free_ports(1)[0]}"
    with Guard() as guard:
        environ = kept | {
            RUN_DIR: str(guard.run_dir),
            "SPT_NOENV": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": address,
        }
        port = address.split(":")[1]
        head = ["--head", f"--port={port}", "--include-dashboard=false"]
        pids = []
        for host, options in zip(HOSTS, (head, [f"--address={address}"]), strict=True):
            options += [f"--node-ip-address={host}", f"--num-cpus={NODE_CPUS}"]
            if "--head" in options:
                options.append(f"--temp-dir={guard.run_dir}/ray")
            pids.append(_ray_start(environ, options))
        yield Nodes(environ, pids, free_ports(1)[0])


def _ray_start(environ: dict[str, str], options: list[str]) -> int:
    """The pid, once the node runs; the Guard of `environ` ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Ray runtime started" in line:
            return process.pid
    raise AssertionError("".join(lines))


@contextmanager
def serving(nodes: Nodes, tmp_path: Path, cpus_per_rank: float, *options: str) -> Iterator[str]:
    """The URL of `manta serve` in the cluster of these nodes."""
    config: Any = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = nodes.port
    config["applications"][0]["args"] = {
        "engine": {"model": str(DEMO), "device": "cpu", "cache_max_entry_count": 64},
        "model_name": "demo",
        "cpus_per_rank": cpus_per_rank,
    }
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [BIN / "manta", "serve", *options],
        cwd=tmp_path,
        env=nodes.environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Manta serves demo at ")
        yield f"http://127.0.0.1:{nodes.port}/v1"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        deadline = time.monotonic() + START_S
        while sum(nodes.ranks()):
            assert time.monotonic() < deadline, "engines outlive their server"
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("cpus_per_rank", "options", "ranks"),
    [
        (1.5, "--tp 2 --placement ranks", [1, 1]),
        (1.5, "--pp 2 --placement stages", [1, 1]),
        (0.8, "--tp 2 --num-replicas 2", [2, 2]),
    ],
    ids=["tp=2 over two nodes", "pp=2 over two nodes", "two replicas of tp=2"],
)
def test_two_nodes_serve(
    nodes: Nodes, tmp_path: Path, cpus_per_rank: float, options: str, ranks: list[int]
) -> None:
    with serving(nodes, tmp_path, cpus_per_rank, *options.split()) as url:
        assert nodes.ranks() == ranks
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda _: _answer(url, "demo"), range(8)))
        assert answers == [ANSWER] * 8


def test_a_replica_that_no_node_can_hold_says_why(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "engine.yaml").write_text(f"model: {DEMO}\ndevice: cpu\ntp: 8\n")
    process = subprocess.Popen(
        [BIN / "manta", "serve", "--config", tmp_path / "engine.yaml"],
        cwd=ROOT,
        env=nodes.environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        # Ray's warnings may come first.
        line = next(line for line in process.stderr if line.startswith("manta: "))
        assert line == (
            "manta: waiting for the cluster to grow: no node has 3.3 CPU for all ranks (the "
            "largest of 2 has 2 CPU); lower tp or pp, add a node, or let the engine span nodes "
            "(placement: stages, or ranks)\n"
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
