"""Work dirs that are not plain names: `.`, a link, `~`, and a disk's own directory."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError, ConfigError
from engine.quantize import recipes
from engine.quantize.files import disk_errors
from engine.quantize.job import QuantizationJob
from engine.quantize.recipes import Recipe
from engine.quantize.source import Source
from tests.command_line import manta
from tests.tiny_models import TinyModel, tiny_model

RTN = recipes.rtn(32, symmetric=False)


@pytest.fixture
def model() -> TinyModel:
    return tiny_model("llama", hidden_size=64, intermediate_size=128)


def run(model: TinyModel, work_dir: Path, recipe: Recipe = RTN, **options: Any) -> None:
    QuantizationJob(
        source=Source.open(model.path),
        work_dir=work_dir,
        method=recipe.method,
        output=recipe.output,
        settings=recipe.settings,
        **options,
    ).run()


def test_the_directory_one_is_in(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(model, Path("."))
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "here" / "config.json").is_file()


def test_a_link_to_where_there_is_room(model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for overwrite in (False, True):
        run(model, tmp_path / "out", overwrite=overwrite)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "out" / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}


def test_the_home_directory(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ("--w-group-size", "32", "--no-eval")
    code, text = manta("lite", "rtn", str(model.path), "--work-dir=~/out", *options)
    assert code == 0, text
    assert (tmp_path / "out" / "config.json").is_file()


def test_nobodys_home() -> None:
    code, text = manta("lite", "rtn", "~nobody-of-this-name/m")
    assert code == 1
    assert "the name of no user" in text


@pytest.mark.parametrize("restart", [False, True])
def test_what_another_left_beside_it_is_kept(
    restart: bool, model: TinyModel, tmp_path: Path
) -> None:
    theirs = tmp_path / ".out.partial" / "model.part1"
    theirs.parent.mkdir()
    theirs.write_text("half of a download")
    with pytest.raises(ConfigError, match=r"model\.part1 is no work of Manta's"):
        run(model, tmp_path / "out", restart=restart)
    assert theirs.read_text() == "half of a download"


def test_where_a_disk_is_mounted(model: TinyModel) -> None:
    mount = next(path for path in map(Path, ("/dev/shm", "/proc", "/dev")) if os.path.ismount(path))
    with pytest.raises(ConfigError, match="is where a disk is mounted"):
        run(model, mount, overwrite=True)


def test_a_tokenizer_of_another_model_is_refused(model: TinyModel, tmp_path: Path) -> None:
    awq = recipes.awq(32, symmetric=False)
    with pytest.raises(CheckpointError, match=r"token id 131, .* vocabulary of 131"):
        run(model, tmp_path / "out", awq, samples=torch.full((1, 4), 131))


def test_a_file_elsewhere_is_not_blamed_on_the_work_dir(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"cannot read or write .*source/gone.*No such file"),
        disk_errors(tmp_path / ".out.partial", 0),
    ):
        (tmp_path / "source" / "gone").read_bytes()
