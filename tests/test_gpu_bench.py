"""The GPU benchmark rehearsed without a GPU, and without what it must not need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.stages import GRACE_SECONDS, STAGES, TUNE, read_report
from benchmarks.gpu.summary import tables
from benchmarks.gpu.targets import targets
from benchmarks.gpu.tune import write
from kernels.gpu.tiles import tables as tables_of_tiles

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("ray", "fastapi", "starlette", "pydantic", "httpx", "openai")


def _run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """In processes that have none of FORBIDDEN."""
    absent = "".join(f"sys.modules[{name!r}] = None\n" for name in FORBIDDEN)
    (folder / "sitecustomize.py").write_text(f"import sys\n{absent}")
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "OUT": str(folder)}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_stage_runs_on_tiny_shapes(tmp_path: Path) -> None:
    stages = tmp_path / "stages.json"
    run = _run(tmp_path, "--rehearse", "--json", str(stages))
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    report = read_report(stages)
    assert list(report) == [stage.name for stage in (*STAGES, TUNE)]
    assert {section["ended"] for section in report.values()} == {"complete"}
    checks = [check for section in report.values() for check in section.get("checks", {}).values()]
    assert len(checks) > 20
    assert {table.title.split(",")[0] for table in tables(report)} >= {"Goals", "Stages", "Engine"}


def test_a_wrong_result_fails_the_run(tmp_path: Path) -> None:
    """What the rehearsal reports as right is wrong once a kernel is."""
    fault = (
        "import sys, torch\n"
        "sys.argv = ['', '--rehearse', 'linear_checks', '--in-process', '--json', sys.argv[1]]\n"
        "import kernels.gpu.w4a16 as module\n"
        "right = module.w4a16_linear\n"
        "module.w4a16_linear = lambda x, *rest: right(torch.cat((x[:-1], 2 * x[-1:])), *rest)\n"
        "from benchmarks.gpu.__main__ import main\n"
        "main()\n"
    )
    path = tmp_path / "stages.json"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", fault, str(path)], cwd=ROOT, env=environment, check=True)
    checks = json.loads(path.read_text())["linear_checks"]["checks"]
    wrong = [label for label, check in checks.items() if not check["ok"]]
    assert any("partial" in label for label in wrong)
    assert not any("norm" in label for label in wrong)


def test_unknown_stages_are_refused(tmp_path: Path) -> None:
    run = _run(tmp_path, "--rehearse", "ceiling")
    assert run.returncode == 2
    assert "no stage ceiling; there are warm_caches, ceilings" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs_without_one(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert run.returncode == 2
    assert "torch sees no GPU; --rehearse" in run.stderr


def test_goals_are_met_or_missed_or_not_measured() -> None:
    rows = [
        {"shape": shape, "m": m, "ours_us": 10.0, "cublas_us": cublas}
        for shape in ("qkv", "o")
        for m, cublas in ((1, 28.0), (16, 29.0))
    ]
    report = {
        "linears": {"rows": rows},
        "engine_int4": {"plain": {"ttft_ms": 20.0, "decode": {"1": {"tokens_per_s": 275.0}}}},
    }
    found: dict[str, tuple[object, object]] = {
        target.what: (target.met, target.ratio) for target in targets(report)
    }
    assert found["int4 linears over cuBLAS bf16, M=1"] == (True, pytest.approx(1.0))
    assert found["int4 linears over cuBLAS bf16, M=16"] == (False, pytest.approx(2.9 / 3))
    assert found["int4 linears over cuBLAS bf16, M=32"] == (None, None)
    assert found["int4 weights, plain KV, 1 streams"] == (False, pytest.approx(0.5))
    assert found["first token of a prompt of 1,024"] == (True, pytest.approx(1.5))


def test_no_stage_outlives_its_command() -> None:
    """A stage whose process hangs is ended within the ten minutes of a command."""
    assert max(stage.seconds for stage in (*STAGES, TUNE)) + GRACE_SECONDS < 540


def test_tuned_tiles_are_written_as_launchers_read_them(tmp_path: Path) -> None:
    entry = {"key": {"m": 16, "n": 4096}, "tile": {"block_n": 128, "scale": "after"}}
    report = {
        "ceilings": {"device": {"name": "NVIDIA H200"}},
        "tune": {"kernels": {"w4a16": [entry], "decode_attention": []}},
    }
    path = write(report, tmp_path)
    assert path.name == "nvidia-h200.json"
    assert tables_of_tiles(path) == {"w4a16": {(("m", 16), ("n", 4096)): entry["tile"]}}
