"""What the quantisation job writes is served, and says what was done."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, SamplingParams
from engine.errors import ConfigError
from engine.quantize import assemble, recipes
from engine.quantize.job import JobRecord
from engine.quantize.recipes import Recipe
from tests.dequantized import tensors_of
from tests.quantize_jobs import (
    AWQ,
    GROUP,
    NUM_TOKENS,
    RTN,
    SIZES,
    greedy,
    make_job,
    reference_greedy,
)
from tests.tiny_models import TinyModel, copy_model, tiny_model, write_servable_model

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


@pytest.fixture
def model() -> TinyModel:
    return tiny_model("llama", **SIZES)


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
