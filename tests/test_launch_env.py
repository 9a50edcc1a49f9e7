"""What `manta serve` finds and sets around itself: variables, HAProxy, ports, what is missing."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app import check_env, launch_env
from serve_app.ports import free_ports
from serve_app.progress import Progress

ROOT = Path(__file__).resolve().parent.parent


def test_the_user_s_variables_win(tmp_path: Path) -> None:
    environ = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_AUTH_MODE": "disabled"}
    launch_env.set_local_defaults(environ, tmp_path, verbose=False)
    assert environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert environ["RAY_AUTH_MODE"] == "disabled"
    assert environ["RAY_SERVE_LOG_TO_STDERR"] == "0"
    ports = [environ[name] for name in launch_env.SIDE_PORTS]
    assert len(set(ports)) == len(ports)


def test_joining_leaves_serve_s_flags_to_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environ: dict[str, str] = {}
    launch_env.set_joining_defaults(environ, verbose=True)
    assert environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environ
    environ = {"RAY_AUTH_TOKEN": "secret"}
    launch_env.set_joining_defaults(environ, verbose=True)
    assert environ["RAY_AUTH_MODE"] == "token"


def test_haproxy_gets_an_edited_configuration(tmp_path: Path) -> None:
    """Its own pages are for this machine only, under the two spellings of Serve's template; a
    frontend says where it listens. Bodies are buffered, not spliced."""
    (tmp_path / "haproxy").write_text("#!/bin/sh\necho $*\n")  # the user's own
    (tmp_path / "haproxy").chmod(0o755)
    environ = {"PATH": os.environ["PATH"], launch_env.BINARY: str(tmp_path / "haproxy")}
    launch_env.set_local_defaults(environ, tmp_path, verbose=False)
    assert Path(environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent == tmp_path
    path = tmp_path / "cfg"
    frontends = "  bind 0.0.0.0:8000\n  bind :::8000\n  bind ::1:8000\n"
    splice = "    option splice-request\n    option splice-response\n"
    path.write_text(splice + "    bind :9101\n  bind *:8404\n" + frontends)
    command: list[str | Path] = [environ[launch_env.BINARY], "-db", "-f", path, "-x", "a b"]
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    assert done.stdout == f"-db -f {path} -x a b\n"
    options = "    option http-buffer-request\n    option splice-response\n"
    own = "    bind 127.0.0.1:9101\n  bind 127.0.0.1:8404\n"
    assert path.read_text() == options + own + frontends
    path.write_text("bind  *:8404\n")  # as no version of Serve writes it yet
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "still binds a port of every interface" in done.stderr


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_check_env_knows_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_env.report()
    assert "torch" in capsys.readouterr().out
    lines = ["no-such-package>=1", "numpy>=99", 'only-elsewhere; platform_system == "Plan9"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert not check_env.report()
    out = capsys.readouterr().out
    assert 'pip install "no-such-package>=1"' in out
    assert 'pip install "numpy>=99"' in out
    assert "only-elsewhere" not in out


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("waiting") as progress:
        progress.say("still waiting")
    assert capsys.readouterr().err == ""


def test_progress_draws_and_clears_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("serve_app.progress.INTERVAL_S", 0.001)
    with Progress("waiting"):
        while "waiting (0 s)" not in terminal.getvalue():
            pass
    assert terminal.getvalue().endswith("\r\x1b[K")
