"""The quantisation job: what it writes is served, survives a kill, and refuses bad input."""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import LLM, SamplingParams
from engine.errors import CheckpointError, ConfigError
from engine.quantize import assemble, job, recipes, staging
from engine.quantize.job import Interrupted, JobRecord, QuantizationJob
from engine.quantize.layer import DenseLayer
from engine.quantize.method import LayerResult, Method
from engine.quantize.recipes import Recipe
from engine.quantize.source import Source
from engine.quantize.staging import Staging
from engine.quantize.statistics import Calibration
from tests.dequantized import put_into_reference, tensors_of
from tests.paged_decoding import PagedDecoder
from tests.tiny_models import TinyModel, copy_model, tiny_model, write_servable_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "vocab_size": 131,
}
GROUP = 32
AWQ = recipes.awq(GROUP, symmetric=False, search_scale=False)
RTN = recipes.rtn(GROUP, symmetric=False)
RECIPES = {
    "awq": recipes.awq(GROUP, False),
    "awq symmetric": recipes.awq(GROUP, True),
    "gptq": recipes.gptq(GROUP, True),
    "gptq asymmetric": recipes.gptq(GROUP, False),
    "gptq in order": recipes.gptq(GROUP, True, desc_act=True),
    "one group": recipes.rtn(-1, False, "gptq"),
    "compressed": recipes.rtn(GROUP, True, "compressed-tensors"),
    "compressed asymmetric": recipes.awq(GROUP, False, "compressed-tensors"),
    "int8": recipes.smooth_quant("int8", 0.5),
    "fp8": recipes.smooth_quant("fp8", 0.5),
}
PROMPT = [5, 6, 7, 8, 9]
NUM_TOKENS = 12


@pytest.fixture
def model() -> TinyModel:
    return tiny_model("llama", **SIZES)


def samples() -> Tensor:
    return torch.randint(3, 131, (3, 16), generator=torch.Generator().manual_seed(1))


def make_job(source: Path, work_dir: Path, recipe: Recipe = AWQ, **options: Any) -> QuantizationJob:
    settings: dict[str, Any] = {
        "source": Source.open(source),
        "work_dir": work_dir,
        "method": recipe.method,
        "output": recipe.output,
        "settings": recipe.settings,
        "samples": samples() if recipe.calibrates else None,
    }
    return QuantizationJob(**(settings | options))


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# -- what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_engine_computes_what_transformers_does(
    name: str, model: TinyModel, tmp_path: Path
) -> None:
    make_job(model.path, tmp_path / "out", RECIPES[name]).run()
    assert greedy(tmp_path / "out") == reference_greedy(model, tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_every_family_s_biases_and_norms_come_along(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **SIZES, **({"head_dim": 16} if family == "qwen3" else {}))
    make_job(model.path, tmp_path / "out").run()
    assert greedy(tmp_path / "out") == reference_greedy(model, tmp_path / "out")


@pytest.mark.parametrize("recipe", [RTN, AWQ, recipes.smooth_quant("fp8", 0.5)])
def test_a_fused_matrix_is_that_of_its_parts(recipe: Recipe, tmp_path: Path) -> None:
    """InternLM2's q, k and v are rows of one matrix; its Llama twin has the same weights."""
    for family in ("llama", "internlm2"):
        twin = tiny_model(family, **SIZES, attention_bias=True)
        make_job(twin.path, tmp_path / family, recipe).run()
    assert greedy(tmp_path / "internlm2") == greedy(tmp_path / "llama")


def test_the_two_commands_of_the_readme_in_process(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    write_servable_model("llama", tmp_path / "dense", **sizes)
    make_job(tmp_path / "dense", tmp_path / "out").run()
    llm = LLM(str(tmp_path / "out"), dtype="float32", cache_max_entry_count=16, num_threads=1)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate("The quick", params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    assert llm.tokenizer.chat_template is not None


@pytest.mark.parametrize("name", ["awq", "gptq in order", "compressed", "int8"])
@pytest.mark.parametrize("family", ["llama", "internlm2"])
def test_what_is_skipped_stays_dense(name: str, family: str, tmp_path: Path) -> None:
    """AWQ and SmoothQuant fold scales into it all the same."""
    model = tiny_model(family, **SIZES)
    parts = ("v_proj", "down_proj") if family == "llama" else ("wqkv", "w2")
    skip: Any = {"skip": ("layers.1.", *parts)}
    recipe = {
        "awq": recipes.awq(GROUP, False, **skip),
        "gptq in order": recipes.gptq(GROUP, True, desc_act=True, **skip),
        "compressed": recipes.rtn(GROUP, True, "compressed-tensors", **skip),
        "int8": recipes.smooth_quant("int8", 0.5, **skip),
    }[name]
    make_job(model.path, tmp_path / "out", recipe).run()
    stored = tensors_of(tmp_path / "out")
    dense = [
        name
        for name in stored
        if name.endswith(".weight") and "norm" not in name and f"{name}_scale" not in stored
    ]
    assert sum("layers.1." in name for name in dense) == (7 if family == "llama" else 5)
    assert sum("layers.2." in name for name in dense) == 2
    if family == "llama":
        assert greedy(tmp_path / "out") == reference_greedy(model, tmp_path / "out")
    else:
        assert len(greedy(tmp_path / "out")) == NUM_TOKENS


def test_a_name_that_skips_nothing(model: TinyModel, tmp_path: Path) -> None:
    recipe = recipes.rtn(GROUP, False, skip=("nonsense",))
    with pytest.raises(ConfigError, match=r"--skip nonsense matches no linear; .*q_proj"):
        make_job(model.path, tmp_path / "out", recipe).run()


def greedy(path: Path) -> list[int]:
    """The engine's tokens."""
    return PagedDecoder(path).greedy(PROMPT, NUM_TOKENS)


def reference_greedy(model: TinyModel, path: Path) -> list[int]:
    """transformers' tokens, with weights read independently."""
    reference = put_into_reference(model, path)
    with torch.no_grad():
        found = reference.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def test_everything_outside_of_the_layers_is_kept_as_it_is(tmp_path: Path) -> None:
    source = bf16_copy(tiny_model("qwen2", **SIZES, tie_word_embeddings=True), tmp_path / "dense")
    (source / "LICENSE").write_text("as is")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("modeling_x.py", "README.md", "report.json"):
        (source / name).write_text("of the source")
    make_job(source, tmp_path / "out", RTN).run()
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    kept = [name for name in before if "layers" not in name or "norm" in name or "bias" in name]
    assert len(kept) > 3 * SIZES["num_hidden_layers"]
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "chat_template.jinja", "config.json", "generation_config.json"} <= names
    assert not names & {"modeling_x.py", "README.md", "report.json"}
    changed = {"quantization_config"}
    config, old = (
        json.loads((at / "config.json").read_text()) for at in (tmp_path / "out", source)
    )
    assert {key for key in config | old if config.get(key) != old.get(key)} == changed


def bf16_copy(model: TinyModel, directory: Path) -> Path:
    copy = copy_model(model, directory)
    file = directory / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    copy.edit_config(dtype="bfloat16")
    return directory


def test_shards_hold_what_one_file_does(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(model.path, tmp_path / "one", RTN).run()
    monkeypatch.setattr(assemble, "MAX_SHARD_BYTES", 50_000)
    make_job(model.path, tmp_path / "many", RTN).run()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    sizes = [file.stat().st_size for file in (tmp_path / "many").glob("*.safetensors")]
    assert len(set(index["weight_map"].values())) == len(sizes) > 2
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in one.values()
    )
    assert all(torch.equal(one[name], many[name]) for name in one | many)
    assert greedy(tmp_path / "many") == greedy(tmp_path / "one")


def test_the_record_says_what_was_done(model: TinyModel, tmp_path: Path) -> None:
    record = make_job(model.path, tmp_path / "out").run()
    assert isinstance(record, JobRecord)
    assert record.num_layers == 3
    assert [set(errors) for errors in record.errors] == [{*"qkvo", "gate", "up", "down"}] * 3
    assert record.checkpoint_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert record.peak_memory > record.source_bytes


# -- ended in the middle -------------------------------------------------------------------------


@dataclass(frozen=True)
class EndsIn:
    """A method that ends in a layer, once some of it is done."""

    method: Method
    layer: int
    end: Callable[[], None]

    def quantize_layer(self, layer: DenseLayer, calibration: Calibration) -> LayerResult:
        if layer.index == self.layer:
            if calibration is not None:
                calibration.statistics(layer, "gate_up")
            self.end()
        return self.method.quantize_layer(layer, calibration)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Forked by a process that has imported what is needed and computed nothing: this one has threads,
# whose locks a child of its own would wait for.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


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


# -- bad input -----------------------------------------------------------------------------------


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
