"""The short form of `make chaos`: what happens most, in a fixed order, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> dict[str, Any]:
    """The summary of a run that must be clean."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--nodes", "1", *arguments],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=600,  # each fault may take 90 s (site.RECOVERY_S)
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    summary: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return summary


@pytest.mark.slow
@pytest.mark.ray
def test_no_token_is_lost_when_replicas_die_and_are_replaced() -> None:
    summary = run("--faults", "replica,scale,redeploy", "--clients", "4")
    assert summary["complete"] > 0
    assert len(summary["faults"]) == 3


@pytest.mark.slow
@pytest.mark.ray
def test_upgrades_behind_serves_own_proxy_cut_no_stream() -> None:
    summary = run("--faults", "redeploy", "--proxy", "python", "--clients", "4")
    assert summary["resumed"] == summary["streams refused"] == 0
    assert summary["whole answers refused"] == 0
