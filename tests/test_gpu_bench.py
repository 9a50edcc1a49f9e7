"""The GPU benchmark rehearsed without a GPU, and without what it must not need."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record
from benchmarks.gpu import stages
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engine_speed import Span, shares, step_kernels, time_decode
from benchmarks.gpu.engines import decoding, generate
from benchmarks.gpu.floors import kernel_floors, merged_linears, step_floor
from benchmarks.gpu.plan import GPU, REHEARSAL
from benchmarks.gpu.stages import GRACE_SECONDS, RUN_SECONDS, STAGES, TUNE, read_report
from benchmarks.gpu.summary import tables
from benchmarks.gpu.targets import targets
from benchmarks.gpu.transformers_speed import shared_rate
from benchmarks.gpu.tune import write
from benchmarks.report import _section as section_of
from engine.errors import InvalidRequestError
from engine.outputs import SequenceOutput
from engine.sequence import EngineRequest
from kernels.gpu.tiles import tables as tables_of_tiles

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("ray", "fastapi", "starlette", "pydantic", "httpx", "openai")


def _run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """In processes that have none of FORBIDDEN."""
    absent = "".join(f"sys.modules[{name!r}] = None\n" for name in FORBIDDEN)
    (folder / "sitecustomize.py").write_text(f"import sys\n{absent}")
    environment = os.environ | {
        "PYTHONPATH": f"{folder}:{ROOT}", "OUT": str(folder), "MANTA_PEER_LIBRARIES": str(folder)
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_stage_runs_on_tiny_shapes(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    run = _run(tmp_path, "--rehearse", "--json", str(path))
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    report = read_report(path)
    assert list(report) == [stage.name for stage in (*STAGES, TUNE)]
    assert {section["ended"] for section in report.values()} == {"complete"}
    checks = [check for section in report.values() for check in section.get("checks", {}).values()]
    assert len(checks) > 20
    titles = {table.title.split(",")[0] for table in tables(report)}
    assert titles >= {"Goals", "Stages", "Engine"}
    absent = {name: list(section.get("left out", {})) for name, section in report.items()}
    assert absent["linears"] == ["marlin"]
    assert absent["decode_attention"] == ["FlashAttention-3 100"]
    page = section_of(json.loads((tmp_path / "gpu.json").read_text()))
    assert all(f"### {title}" in page for title in titles)
    assert "linears: left out: marlin: FileNotFoundError" in page


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
    assert "no stage ceiling; there are ceilings, warm_caches" in run.stderr


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


def test_all_stages_have_time_for_their_limits() -> None:
    assert sum(stage.seconds for stage in STAGES) <= RUN_SECONDS < 540


def test_a_summary_that_fails_costs_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    monkeypatch.setattr(stages, "_start", lambda names, *rest: started.extend(names))

    def fail(report: object) -> None:
        raise KeyError("floor_us")

    stages.run_all(["ceilings", "linears"], tmp_path / "stages.json", False, fail)
    assert started == ["ceilings", "linears"]
    assert "floor_us" in capsys.readouterr().err


def test_a_record_is_written_where_there_is_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = record.save("gpu", "GPU", [], tmp_path)
    assert json.loads(path.read_text())["revision"] == "unknown"


class _Engine:
    """A token for every request in every step, until one that fails."""

    def __init__(self, num_steps: int = 1000) -> None:
        self.running: set[str] = set()
        self._left = num_steps

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: EngineRequest) -> None:
        assert request.request_id not in self.running
        self.running.add(request.request_id)

    def abort(self, request_id: str) -> None:
        self.running.discard(request_id)

    def step(self) -> list[SequenceOutput]:
        self._left -= 1
        error = InvalidRequestError("no more") if self._left < 0 else None
        return [SequenceOutput(name, [1], error=error) for name in sorted(self.running)]


def test_a_failed_row_leaves_no_requests_to_the_next() -> None:
    engine: Any = _Engine(num_steps=2)
    with pytest.raises(InvalidRequestError):
        generate(engine, [[3], [4]], num_tokens=3)
    assert not engine.running
    with pytest.raises(InvalidRequestError), decoding(engine, [[3], [4]], num_tokens=3):
        pass
    assert not engine.running


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profiler_that_fails_leaves_the_speed(tmp_path: Path) -> None:
    """Nothing runs on a GPU here, so that it has nothing to see."""
    plan = replace(REHEARSAL, on_gpu=True, context=64, decode_steps=2)
    bench = Bench(plan, {}, {}, tmp_path / "stages.json", math.inf)
    engine: Any = _Engine()
    decode: dict[str, Any] = {}
    time_decode(bench, engine, "2 streams", 2, lambda context: 1.0, decode)
    assert decode["2"]["tokens_per_s"] > 0
    assert decode["2"]["floor_us"] == 1.0
    assert list(bench.section["errors"]) == ["2 streams profile"]
    assert not engine.running


def _spans(*times: tuple[str, float, float]) -> list[Span]:
    return [Span(*each) for each in times]


def test_waits_for_the_host_are_the_long_gaps() -> None:
    spans = _spans(("a", 0, 40), ("b", 42, 60), ("c", 50, 80), ("d", 90, 100))
    found = shares(spans, num_steps=2, step_us=55.0)
    assert found["busy_us"] == pytest.approx(44.0)
    assert found["idle_share"] == pytest.approx(0.2)
    assert found["waiting_share"] == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="no kernel"):
        shares([], num_steps=2, step_us=55.0)


def test_a_layers_products_are_told_apart_by_their_order() -> None:
    product, dense = "w4a16_kernel", "nvjet_gemm" + "x" * 90
    step = [(product, 3.0), ("decode_plain_kernel", 9.0), (product, 2.0), (product, 14.0),
            (product, 7.0), (dense, 40.0)]  # fmt: skip
    spans = [Span(name, i, i + us) for i, (name, us) in enumerate(2 * step)]
    kernels = step_kernels(spans, num_steps=2, num_layers=1)
    assert {name: row["us"] for name, row in kernels.items()} == {
        dense[:60]: 40.0, "int4 gate_up": 14.0, "decode_plain_kernel": 9.0,
        "int4 down": 7.0, "int4 qkv": 3.0, "int4 o": 2.0,
    }  # fmt: skip
    assert {row["launches"] for row in kernels.values()} == {1.0}
    assert next(iter(kernels)).startswith("nvjet")
    assert product in step_kernels(spans, num_steps=1, num_layers=3)  # some are cuBLAS's

    report = {"engine_int4": {"plain": {"decode": {"64": {
        "tokens_per_s": 1.0, "step_us": 80.0, "floor_us": 40.0, "kernels": kernels,
        "floors_us": {"head": 30.0, "attention": 8.0, "int4 down": 6.5},
    }}}}}  # fmt: skip
    table = next(table for table in tables(report) if table.title.startswith("Decode step"))
    assert table.columns == ["kernel", "64 streams", "floor"]
    assert [row[2] for row in table.rows] == [30.0, "-", 8.0, 6.5, "-", "-"]


def test_phases_of_a_step_add_up_to_its_floor(tmp_path: Path) -> None:
    bench = Bench(GPU, {}, {}, tmp_path / "stages.json", math.inf)
    floors = kernel_floors(bench, True, 8, 64, 1024.0)
    whole = step_floor(bench, True, 8, 64, 1024.0)
    products = sum(us for name, us in floors.items() if name.startswith("int4"))
    assert products >= whole.linears * (1 - 1e-9)  # the larger of bytes and FLOPs of each
    assert products == pytest.approx(whole.linears, rel=0.05)
    assert floors["attention"] == whole.attention
    assert merged_linears(GPU.model) == GPU.linears


def test_the_rate_of_streams_is_that_of_their_common_time() -> None:
    stamps = [[0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]
    assert shared_rate(stamps) == pytest.approx(2.0)
    with pytest.raises(AssertionError, match="no time"):
        shared_rate([[0.0, 1.0], [2.0, 3.0]])


def test_time_that_a_stage_leaves_is_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, float] = {}
    monkeypatch.setattr(
        stages, "_start", lambda names, path, seconds, rehearse: limits.update({names[0]: seconds})
    )
    stages.run_all([stage.name for stage in STAGES], tmp_path / "x", False, lambda report: None)
    assert all(limits[stage.name] >= stage.seconds - GRACE_SECONDS for stage in STAGES)
    assert limits[STAGES[-1].name] == pytest.approx(RUN_SECONDS - GRACE_SECONDS, abs=1)
    first = RUN_SECONDS - GRACE_SECONDS - sum(stage.seconds for stage in STAGES[1:])
    assert limits[STAGES[0].name] == pytest.approx(max(first, STAGES[0].seconds), abs=1)


def test_tuned_tiles_are_written_as_launchers_read_them(tmp_path: Path) -> None:
    entry = {"key": {"m": 16, "n": 4096}, "tile": {"block_n": 128, "scale": "after"}}
    report = {
        "ceilings": {"device": {"name": "NVIDIA H200"}},
        "tune": {"kernels": {"w4a16": [entry], "decode_attention": []}},
    }
    path = write(report, tmp_path)
    assert path.name == "nvidia-h200.json"
    assert tables_of_tiles(path) == {"w4a16": {(("m", 16), ("n", 4096)): entry["tile"]}}
