"""The Triton kernels in Triton's interpreter: each file of tests/interpreted in its own process.

Triton decides when it is imported whether it compiles or interprets. As many files run at once as
there are processors: one uses one.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))

Run = subprocess.CompletedProcess[str]


def interpret(path: Path) -> Run:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> "Iterator[dict[Path, Future[Run]]]":
    """Of the files whose tests were chosen."""
    chosen = [
        cast(Path, item.callspec.params["path"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_interpreted.__name__
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {path: pool.submit(interpret, path) for path in chosen}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path, runs: "dict[Path, Future[Run]]") -> None:
    run = runs[path].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
