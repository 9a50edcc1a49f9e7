"""What a quantisation job refuses, by name and before anything has its final name."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.quantize import recipes
from engine.quantize.source import Source
from engine.quantize.staging import Staging
from tests.quantize_jobs import AWQ, GROUP, RTN, SIZES, EndsIn, files_of, make_job
from tests.tiny_models import TinyModel, copy_model, tiny_model


@pytest.fixture
def model() -> TinyModel:
    return tiny_model("llama", **SIZES)


def test_a_work_dir_is_overwritten_only_when_asked(model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make_job(model.path, out, RTN).run()  # an empty one is no work of anybody's
    before = files_of(out)
    with pytest.raises(ConfigError, match=r"is not empty; .*--overwrite"):
        make_job(model.path, out, AWQ).run()
    assert files_of(out) == before
    (out / "own.txt").write_text("not of the source")
    make_job(model.path, out, AWQ, overwrite=True).run()
    assert not (out / "own.txt").exists()
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match="replaces checkpoints only"):
        make_job(model.path, out, AWQ, overwrite=True).run()


def test_a_work_dir_that_cannot_be(model: TinyModel, tmp_path: Path) -> None:
    source = copy_model(model, tmp_path / "models" / "dense").path
    (tmp_path / "file").touch()
    for work_dir, reason in (
        (source, "is the model itself"),
        (source / "out", "inside the model's directory"),
        (source.parent, "around the model"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "cannot write to"),
        (Path("/proc/nowhere/out"), "cannot write to"),
    ):
        with pytest.raises(ConfigError, match=reason):
            make_job(source, work_dir).run()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
def test_a_value_that_is_none_is_named_before_any_work(
    name: str, value: float, model: TinyModel, tmp_path: Path
) -> None:
    source = copy_model(model, tmp_path / "dense").path
    edit_tensors(source, lambda tensors: tensors[name].view(-1)[7].fill_(value))
    with pytest.raises(CheckpointError, match=f"{name} holds 1 values that are NaN or infinite"):
        make_job(source, tmp_path / "out").run()
    assert Staging(tmp_path / "out").num_layers() == 0
    assert not (tmp_path / "out").exists()


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_shards_that_are_not_whole(model: TinyModel, tmp_path: Path) -> None:
    source = copy_model(model, tmp_path / "dense").path
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is truncated"):
        Source.open(source)
    file.write_bytes(whole)
    edit_tensors(source, lambda t: t.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight should be \[64\].*found \[65\]"
    ):
        Source.open(source)
    edit_tensors(source, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \[64\] is missing"):
        Source.open(source)


def test_what_is_no_dense_model_of_a_known_family(model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already quantised"):
        Source.open(tiny_model("llama", awq_group_size=8).path)
    source = copy_model(model, tmp_path / "dense")
    source.edit_config(architectures=["MambaForCausalLM"])
    with pytest.raises(CheckpointError, match="'MambaForCausalLM' is not supported"):
        Source.open(source.path)


def test_group_sizes_that_do_not_divide_are_named(tmp_path: Path) -> None:
    odd = tiny_model("llama", hidden_size=64, intermediate_size=96)
    with pytest.raises(
        CheckpointError,
        match=r"layers\.0\.self_attn\.q_proj: 64 inputs are no multiple of group size 128; "
        r"allowed for this model: 32, -1",
    ):
        make_job(odd.path, tmp_path / "out", recipes.rtn(128, False)).run()
    with pytest.raises(CheckpointError, match=r"down_proj: 96 inputs are no multiple .* 64"):
        make_job(odd.path, tmp_path / "out", recipes.rtn(64, False)).run()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"must be one of 32, 64, 128, or -1.* got 48"):
        recipes.rtn(48, False)


def test_what_a_format_cannot_say() -> None:
    with pytest.raises(ConfigError, match="awq cannot store the order of --desc-act"):
        recipes.gptq(GROUP, True, "awq", desc_act=True)
    output = replace(recipes.smooth_quant("int8", 0.5).output)
    with pytest.raises(ConfigError, match="--format gptq stores 4-bit weights; int8"):
        replace(output, format="gptq")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file may become larger: what a full disk does, for whoever may write anywhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("num_bytes", "num_done"), [(4_000, 0), (60_000, 3)])
def test_a_disk_that_fills_up(
    num_bytes: int, num_done: int, model: TinyModel, tmp_path: Path
) -> None:
    """In the first layer's states, and in the checkpoint, when all layers are done."""
    out = tmp_path / "out"
    with (
        largest_file(num_bytes),
        pytest.raises(CheckpointError, match=r"takes no more .* needs .* KiB there in all"),
    ):
        make_job(model.path, out).run()
    assert not out.exists()
    assert Staging(out).num_layers() == num_done
    assert not list(tmp_path.rglob("*.tmp"))
    assert make_job(model.path, out).run().num_layers == 3 - num_done


def test_a_disk_without_room_is_refused_first(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = os.statvfs(tmp_path)
    assert usage.f_bavail > 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"has 1 KiB free, and the job needs \d+ KiB there"):
        make_job(model.path, tmp_path / "out").run()
    assert Staging(tmp_path / "out").num_layers() == 0


def test_a_source_that_changes_meanwhile(model: TinyModel, tmp_path: Path) -> None:
    source = copy_model(model, tmp_path / "dense").path
    method = EndsIn(AWQ.method, 2, lambda: os.utime(source / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"changed while it was read.*--restart"):
        make_job(source, tmp_path / "out", method=method).run()
    assert not (tmp_path / "out").exists()
