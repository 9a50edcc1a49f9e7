"""Starting and stopping for real: `manta serve`, and `serve run` on Ray's own proxy."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import openai
import pytest
import yaml

from serve_app.ports import check_port, free_ports
from serve_app.processes import RUN_DIR, started_with
from tests.load import check_burst, check_leaving

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DEMO = ROOT / "models" / "demo-awq"
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")  # IPv4, and as IPv6 writes it
START_S = 180  # a machine busy with other tests; alone it takes 12


def clean_environ() -> dict[str, str]:
    """Without what the test session has set for its own Ray."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"RAY_ADDRESS": "local", "RAY_metrics_report_interval_ms": "500"}


class Server:
    """A process of ours, all that it starts, and what of that is left."""

    url = ""

    def __init__(self, *command: str | Path, cwd: Path = ROOT) -> None:
        self._mark = f"MANTA_TEST={uuid4()}"
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=clean_environ() | dict([self._mark.split("=")]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def await_ready(self) -> str:
        """The URL in the line that says so."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"Manta serves \S+ at (http://\S+)/v1 \(\d+\.\d s\)\n", line)
        assert found is not None, line + self.process.stdout.read()
        return found[1]

    def processes(self) -> dict[int, str]:
        """pid → command of what lives: they all inherit the mark, except the guard, a child."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
                environ = (path / "environ").read_text(errors="replace").split("\0")
                if state != "Z" and (int(parent) == self.process.pid or self._mark in environ):
                    command = (path / "cmdline").read_text(errors="replace")
                    found[int(path.name)] = command.replace("\0", " ")
        return found

    def run_dir(self) -> Path:
        (guard,) = [each for each in self.processes().values() if "processes.py" in each]
        return Path(guard.split()[-1])

    def end(self, signum: signal.Signals, patience_s: float = 60) -> None:
        """Send a signal; afterwards every process that was there, or came, is gone."""
        before = self.processes()
        self.process.send_signal(signum)
        self.process.wait(timeout=patience_s)
        deadline = time.monotonic() + patience_s
        while left := [pid for pid in before | self.processes() if _alive(pid)]:
            assert time.monotonic() < deadline, [before.get(pid) for pid in left]
            time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def running(*command: str | Path, cwd: Path = ROOT) -> Iterator[Server]:
    """Ends with SIGINT unless the test has ended it; whatever happens, nothing is left."""
    server = Server(*command, cwd=cwd)
    try:
        yield server
        if server.process.poll() is None:
            server.end(signal.SIGINT)
    finally:
        server.process.kill()
        server.process.wait()
        for pid in server.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if server.process.stdout is not None:
            server.process.stdout.close()


def _answer(url: str, model: str) -> str | None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 2 + 3?"}],
        max_tokens=16,
        temperature=0,
    )
    return reply.choices[0].message.content


@pytest.fixture(scope="module")
def manta_serve() -> Iterator[Server]:
    """`manta serve` with the demo model, ended by SIGINT."""
    with running(BIN / "manta", "serve", "--port", "0") as server:
        server.url = server.await_ready()
        run_dir = server.run_dir()
        assert run_dir.is_dir()
        yield server
    assert server.process.returncode == 0
    assert not run_dir.exists()


@pytest.mark.slow
@pytest.mark.ray
def test_manta_serve_answers_once_it_says_so(manta_serve: Server) -> None:
    assert _answer(f"{manta_serve.url}/v1", "demo")
    assert httpx.get(f"{manta_serve.url}/health").status_code == 200


@pytest.mark.slow
@pytest.mark.ray
def test_manta_serve_listens_on_this_machine_only(manta_serve: Server) -> None:
    """Serve binds a replica's gRPC port to every interface; Ray's token protects it."""
    listeners = [
        (address, manta_serve.processes()[pid])
        for pid in manta_serve.processes()
        for address in _listen_addresses(pid)
    ]
    assert len(listeners) > 8
    beyond = [command for address, command in listeners if address not in LOOPBACK]
    assert [command.split(":")[2] for command in beyond] == ["ServeReplica"]
    assert stat.S_IMODE(manta_serve.run_dir().stat().st_mode) == 0o700


@pytest.mark.slow
@pytest.mark.ray
def test_haproxy_passes_on_a_burst_and_clients_that_leave(manta_serve: Server) -> None:
    (session,) = {
        found[1]
        for command in manta_serve.processes().values()
        if (found := re.search(r"--session[-_]dir[= ](\S+)", command))
    }
    (port,) = Path(session).glob("metrics_export_port_*")
    check_burst(manta_serve.url, "demo")
    metrics_url = f"http://127.0.0.1:{port.read_text()}/metrics"
    check_leaving(manta_serve.url, "demo", 1000, metrics_url)


@pytest.mark.slow
@pytest.mark.ray
def test_serve_run_works_beside_it_on_the_default_proxy(
    manta_serve: Server, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["model_name"] = "other"
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}"
    with running(BIN / "serve", "run", path) as server:
        deadline = time.monotonic() + START_S
        while not _healthy(url):
            assert server.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert _answer(f"{url}/v1", "other")
        assert _answer(f"{manta_serve.url}/v1", "demo")  # neither took the other's place
        # Serve waits graceful_shutdown_timeout_s, 120, if it takes a request for open.
        server.end(signal.SIGINT, patience_s=150)
    assert server.process.returncode == 0


def _listen_addresses(pid: int) -> list[str]:
    """Local addresses in /proc/net/tcp's hexadecimal, of the sockets a process listens on."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(fd))
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    listening = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    return [row[1].rpartition(":")[0] for row in listening]


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_server_leaves_nothing() -> None:
    """SIGKILL, as the kernel sends when memory is short: nobody can clean up in that process."""
    with running(BIN / "manta", "serve", "--port", "0") as server:
        url = server.await_ready()
        run_dir = server.run_dir()
        assert any("haproxy -db" in command for command in server.processes().values())
        server.end(signal.SIGKILL)
        assert not run_dir.exists()
        assert not _healthy(url)
        check_port("127.0.0.1", int(url.rpartition(":")[2]))  # raises when it is taken


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_ends_open_streams_with_an_error_event() -> None:
    """More tokens than two seconds are enough for; a stream that breaks off raises here."""
    with running(BIN / "manta", "serve", "--port", "0") as server:
        client = openai.OpenAI(base_url=f"{server.await_ready()}/v1", api_key="none")
        stream = client.completions.create(
            model="demo",
            prompt=["a"] * 64,
            max_tokens=900,
            extra_body={"ignore_eos": True},
            stream=True,
        )
        next(iter(stream))
        ending = threading.Thread(target=server.end, args=[signal.SIGINT])
        ending.start()
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass
        ending.join()
        assert server.process.returncode == 0


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.ray
def test_a_checkpoint_the_engine_refuses_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    """Found out by the engine actor only: its message comes through three layers of Ray."""
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 77}))
    done = subprocess.run(
        [BIN / "manta", "serve", tmp_path, "--port", "0"],
        env=clean_environ(),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"manta: cannot serve {tmp_path.name}: ")
    assert "model.layers." in done.stderr
    assert done.stderr.count("\n") == 1


STUBBORN = """
import os, subprocess, sys
from serve_app.processes import RUN_DIR, Guard
with Guard() as guard:
    script = "trap '' TERM; sleep 600 & echo ready; wait"
    child = subprocess.Popen(
        ["sh", "-c", script], env={RUN_DIR: str(guard.run_dir)}, start_new_session=True,
        stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    print(guard.run_dir, child.pid, guard._process.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_guard_ends_what_was_started(killed: bool) -> None:
    """Whether its owner leaves it or is killed, and whatever its processes do against it."""
    bystander = subprocess.Popen(["sleep", "600"], env={RUN_DIR: "/tmp/manta-another"})
    owner = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        run_dir, *pids = owner.stdout.readline().split()
        assert Path(run_dir).is_dir()
        assert all(_alive(int(pid)) for pid in pids)
        assert len(started_with(Path(run_dir))) == 2  # the shell and its sleep
        if killed:
            owner.kill()
        owner.communicate(timeout=60)
        deadline = time.monotonic() + 60
        while Path(run_dir).exists() or any(_alive(int(pid)) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert started_with(Path(run_dir)) == {}
        assert bystander.poll() is None
    finally:
        owner.kill()
        owner.wait()
        bystander.kill()
        bystander.wait()


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_whose_ray_died_ends_with_the_reason() -> None:
    """Calls to a cluster without its raylet wait for ever."""
    with running(BIN / "manta", "serve", "--port", "0") as server:
        server.await_ready()
        run_dir = server.run_dir()
        (raylet,) = [
            pid for pid, command in server.processes().items() if "raylet/raylet" in command
        ]
        os.kill(raylet, signal.SIGKILL)
        output, _ = server.process.communicate(timeout=60)
        assert server.process.returncode == 1
        assert "manta: stopped serving demo: Ray's raylet ended with code -9" in output
        assert not server.processes()
        assert not run_dir.exists()
