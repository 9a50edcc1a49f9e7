"""A quantisation job that ends in the middle goes on to the same bytes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.quantize import job, recipes, staging
from engine.quantize.job import Interrupted, QuantizationJob
from engine.quantize.recipes import Recipe
from engine.quantize.staging import Staging
from tests.quantize_jobs import AWQ, FORKS, RTN, SIZES, EndsIn, files_of, make_job, samples
from tests.tiny_models import TinyModel, copy_model, tiny_model


@pytest.fixture
def model() -> TinyModel:
    return tiny_model("llama", **SIZES)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(run: Callable[..., object], *args: object) -> None:
    """In a process of its own, which a SIGKILL ends."""
    process = FORKS.Process(target=run, args=args)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("recipe", [AWQ, RTN], ids=["awq", "rtn"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    recipe: Recipe, layer: int, model: TinyModel, tmp_path: Path
) -> None:
    make_job(model.path, tmp_path / "whole", recipe).run()
    method = EndsIn(recipe.method, layer, kill)
    run_and_die(make_job(model.path, tmp_path / "out", recipe, method=method).run)
    assert not (tmp_path / "out").exists()
    record = make_job(model.path, tmp_path / "out", recipe).run()
    assert record.num_layers == 3 - layer
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not Staging(tmp_path / "out").directory.exists()


@pytest.mark.parametrize("step", ["finish_layer", "write_tensors", "assemble", "publish"])
def test_a_kill_between_any_two_files_loses_nothing(
    step: str, model: TinyModel, tmp_path: Path
) -> None:
    """Between the states of a layer and the layer, in and after the checkpoint."""
    make_job(model.path, tmp_path / "whole").run()
    run_and_die(run_until, step, make_job(model.path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    make_job(model.path, tmp_path / "out").run()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def run_until(step: str, work: QuantizationJob) -> None:
    owner: Any = {"write_tensors": staging, "assemble": job}.get(step, Staging)
    setattr(owner, step, lambda *_, **__: kill())
    work.run()


def test_ctrl_c_says_how_to_go_on(model: TinyModel, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"after 2 of 3 layers.* the same command goes on"):
        make_job(model.path, tmp_path / "out", method=EndsIn(AWQ.method, 2, interrupt)).run()
    assert make_job(model.path, tmp_path / "out").run().num_layers == 1


def test_other_settings_or_another_source_are_told_apart(model: TinyModel, tmp_path: Path) -> None:
    source, out = copy_model(model, tmp_path / "dense"), tmp_path / "out"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        make_job(source.path, out, method=EndsIn(AWQ.method, 1, stop)).run()
    with pytest.raises(CheckpointError, match=r"settings\.group_size was 32, now 64.*--restart"):
        make_job(source.path, out, recipes.awq(64, False)).run()
    with pytest.raises(CheckpointError, match=r"settings\.samples changed"):
        make_job(source.path, out, samples=samples()[:2]).run()
    os.utime(source.path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"source\.files changed"):
        make_job(source.path, out).run()
    assert make_job(source.path, out, restart=True).run().num_layers == 3


def test_two_runs_do_not_meet(model: TinyModel, tmp_path: Path) -> None:
    work = Staging(tmp_path / "out")
    work.directory.mkdir()
    with (
        work.locked(),
        pytest.raises(CheckpointError, match=f"process {os.getpid()} on .* is working in"),
    ):
        make_job(model.path, tmp_path / "out").run()
    make_job(model.path, tmp_path / "out").run()
