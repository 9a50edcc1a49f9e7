"""The Triton kernels in Triton's interpreter: the files of tests/interpreted."""

from pathlib import Path

import pytest

from tests.background import Background

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path, background: Background) -> None:
    run = background.interpreted[path].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[:4000]
