"""`quantize`: a dense checkpoint is quantised once per node, and loaded from there."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams
from engine.config import EngineConfig, Quantize
from engine.errors import CheckpointError, ConfigError
from engine.models import load_spec
from engine.models.footprint import footprint
from engine.parallel import ParallelGroup
from engine.quantize import on_load, recipes
from engine.quantize.on_load import quantized_checkpoint
from engine.rank_model import RankModel, check_same_quantized
from tests.command_line import manta
from tests.quantize_jobs import FORKS, files_of, make_job, reference_greedy
from tests.tiny_models import TinyModel, copy_model, tiny_model, write_servable_model

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
METHODS: tuple[Quantize, ...] = ("awq", "rtn", "int8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_servable_model("llama", tmp_path_factory.mktemp("dense") / "tiny", **SIZES)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_load, "NUM_SAMPLES", 4)
    monkeypatch.setattr(on_load, "SEQLEN", 32)


def config_of(model: Path, cache: Path, quantize: Quantize = "rtn", **more: Any) -> EngineConfig:
    return EngineConfig(model=str(model), weights_cache=str(cache), quantize=quantize, **more)


@pytest.mark.parametrize("quantize", METHODS)
def test_it_computes_with_the_quantised_weights(
    quantize: Quantize, model: TinyModel, tmp_path: Path
) -> None:
    llm = LLM(
        str(model.path),
        quantize=quantize,
        weights_cache=str(tmp_path),
        dtype="float32",
        cache_max_entry_count=16,
        num_threads=1,
    )
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate([[5, 6, 7, 8, 9]], params, use_tqdm=False)
    (made,) = (path.parent for path in (tmp_path / "quantized").glob("*/config.json"))
    assert output.outputs[0].token_ids == reference_greedy(model, made)
    assert llm.tokenizer.chat_template is not None


def test_it_is_made_once_and_found_again(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(model.path, tmp_path)
    with quantized_checkpoint(config, "cpu") as first:
        before = files_of(first.path)
    monkeypatch.setattr(on_load, "QuantizationJob", None)  # nothing is quantised any more
    with quantized_checkpoint(config, "cpu") as again:
        assert again == first
    monkeypatch.undo()
    assert files_of(first.path) == before
    first.path.with_name(first.path.name + ".json").unlink()  # its maker died before it summed it
    with quantized_checkpoint(config, "cpu") as summed:
        assert summed == first


def test_what_is_made_is_what_manta_lite_makes(model: TinyModel, tmp_path: Path) -> None:
    """All of it round to nearest, so that equal settings mean equal bytes."""
    make_job(model.path, tmp_path / "lite", recipes.rtn(64, False)).run()
    with quantized_checkpoint(config_of(model.path, tmp_path / "cache"), "cpu") as found:
        assert files_of(found.path) == files_of(tmp_path / "lite")


def test_processes_that_come_together_make_it_once(model: TinyModel, tmp_path: Path) -> None:
    config = config_of(model.path, tmp_path / "cache")
    results = multiprocessing.get_context("forkserver").Manager().list()
    processes = [FORKS.Process(target=load_once, args=(config, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(set(results)) == 1
    assert len(results) == 3


def load_once(config: EngineConfig, results: Any) -> None:
    with quantized_checkpoint(config, "cpu") as found:
        stamp = (found.path / "model.safetensors").stat().st_mtime_ns
        results.append((str(found.path), found.crc32, stamp))


def test_another_source_is_another_checkpoint(model: TinyModel, tmp_path: Path) -> None:
    source = copy_model(model, tmp_path / "dense").path
    paths = []
    for step in range(3):
        if step:
            name, changed = [("config.json", {"rms_norm_eps": 1e-5}), ("", {})][step - 1]
            if name:
                values = json.loads((source / name).read_text()) | changed
                (source / name).write_text(json.dumps(values))
            else:
                (source / "model.safetensors").touch()
        with quantized_checkpoint(config_of(source, tmp_path / "cache"), "cpu") as found:
            paths.append(found.path)
    assert len(set(paths)) == 3


def test_those_unused_longest_are_deleted(model: TinyModel, tmp_path: Path) -> None:
    with quantized_checkpoint(config_of(model.path, tmp_path, "rtn"), "cpu") as old:
        size = sum(map(len, files_of(old.path).values()))
        limit = config_of(model.path, tmp_path, "int8", max_weights_cache_bytes=size + 1)
        with quantized_checkpoint(limit, "cpu") as new:
            assert old.path.is_dir()  # it is in use
    with quantized_checkpoint(limit, "cpu") as again:
        assert again == new
        assert not old.path.exists()


def test_what_a_killed_run_left_of_another_model_is_deleted(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("engine.quantize.job.assemble", killed)
        with (
            pytest.raises(KeyboardInterrupt),
            quantized_checkpoint(config_of(model.path, tmp_path), "cpu"),
        ):
            pass
    (left,) = (tmp_path / "quantized").glob(".*.partial")
    limit = config_of(model.path, tmp_path, "int8", max_weights_cache_bytes=1)
    with quantized_checkpoint(limit, "cpu") as found:
        assert found.path.is_dir()
        assert not left.exists()


@pytest.mark.parametrize(
    ("sizes", "group_size"), [((64, 128), 64), ((128, 256), 128), ((96, 160), 32)]
)
def test_groups_are_the_largest_that_divide(sizes: tuple[int, int], group_size: int) -> None:
    spec = load_spec(tiny_model("llama", hidden_size=sizes[0], intermediate_size=sizes[1]).path)
    assert recipes.on_load("rtn", spec).output.group_size == group_size
    assert recipes.on_load("awq", spec).output.group_size == group_size


def test_what_cannot_be_is_refused_by_name(model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantize must be one of awq, rtn, int8 or null"):
        EngineConfig.from_dict({"model": "m", "quantize": "gptq"})
    with pytest.raises(ConfigError, match="weights_cache, which is null"):
        EngineConfig(model="m", quantize="rtn", weights_cache=None)
    for path, reason in (
        (tiny_model("llama", awq_group_size=8).path, "already quantised"),
        (tmp_path / "elsewhere", "is not on this one; copy it here"),
        (tiny_model("llama").path, "none of them divides the inputs of all linears"),
    ):
        with (
            pytest.raises(CheckpointError, match=reason),
            quantized_checkpoint(config_of(path, tmp_path), "cpu"),
        ):
            pass


def test_ranks_with_other_weights_refuse_to_start() -> None:
    class Uneven(ParallelGroup):
        def min(self, value: int) -> int:
            return min(value, 7)

    config = EngineConfig(model="/models/m", quantize="awq")
    check_same_quantized(7, config, ParallelGroup())
    with pytest.raises(CheckpointError, match=r"different weights on the nodes.*manta lite"):
        check_same_quantized(8, config, Uneven())


@pytest.mark.parametrize("quantize", METHODS)
def test_a_plan_counts_what_is_loaded(quantize: Quantize, model: TinyModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tp": 1,
        "dtype": torch.bfloat16,
        "device": "cpu",
        "session_len": 128,
    }
    spec = recipes.quantized_spec(load_spec(model.path), quantize)
    with quantized_checkpoint(config_of(model.path, tmp_path, quantize), "cpu") as found:
        assert spec == load_spec(found.path)
        assert footprint(spec, **options) == footprint(load_spec(found.path), **options)
    code, text = manta("plan", str(model.path), "--cpu", "--memory", "8GiB", "--quantize", quantize)
    assert code == 0
    assert "8 bits" in text or "int8" in text if quantize == "int8" else "int4" in text
    with pytest.raises(ConfigError, match="is quantised already"):
        recipes.quantized_spec(spec, quantize)


def test_a_rank_loads_it(model: TinyModel, tmp_path: Path) -> None:
    rank = RankModel.load(config_of(model.path, tmp_path), ParallelGroup(), "cpu", None)
    assert rank.spec.quantization is not None
