"""`manta plan` predicts what a loaded model takes, from a config.json alone."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.kv_cache import KVCache, bytes_per_block
from engine.models import load_decoder, load_spec
from engine.models.footprint import Footprint, checkpoint_bytes, footprint
from engine.models.rank_weights import RankWeights
from engine.models.sharding import Shard
from engine.models.spec import DecoderSpec
from engine.parallel import ParallelGroup
from engine.weights.checkpoint import Checkpoint
from engine.worker import Worker
from serve_app.cli import app
from serve_app.plan import RANK_BYTES, Device, Planner
from serve_app.plan_gpus import Memory, read_size
from tests.quantised_models import quantised_model
from tests.stored_formats import FORMATS
from tests.tiny_models import FAMILIES, TinyModel, tiny_model
from tools import sizing

CONTEXT = 128
AWQ: Any = {"hidden_size": 64, "intermediate_size": 128}  # whole groups of 32, also over two ranks
MODELS: dict[str, Callable[[], TinyModel]] = {
    **{family: partial(tiny_model, family) for family in FAMILIES},
    "tied": partial(tiny_model, "llama", tie_word_embeddings=True),
    "awq": partial(tiny_model, "llama", 32, **AWQ),
    "awq with biases": partial(tiny_model, "qwen2", 32, **AWQ),
}
BF16, FP32 = torch.bfloat16, torch.float32


def num_bytes(value: Any, seen: set[int]) -> int:
    """Of every tensor in an object, each counted once."""
    if isinstance(value, Tensor):
        known = id(value) in seen
        seen.add(id(value))
        return 0 if known else value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(num_bytes(part, seen) for part in value)
    if isinstance(value, dict):
        return num_bytes(list(value.values()), seen)
    if is_dataclass(value):
        return sum(num_bytes(getattr(value, field.name), seen) for field in fields(value))
    return num_bytes(vars(value), seen) if hasattr(value, "__dict__") else 0


# -- predictions and what is so ----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.usefixtures("kernels")
def test_weights_of_a_loaded_model(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]()
    spec = load_spec(model.path)
    decoder = load_decoder(
        model.path,
        spec,
        dtype=dtype,
        device="cpu",
        group=ParallelGroup(),
        session_len=CONTEXT,
    )
    predicted = footprint(spec, tp=1, dtype=dtype, device="cpu", session_len=CONTEXT)
    assert predicted.weights == num_bytes(decoder, set())
    table = 2 * CONTEXT * decoder.rotary.cos.shape[-1] * dtype.itemsize
    assert predicted.read_per_step <= predicted.weights - table
    if name == "llama":  # with an embedding apart from its head
        embed = spec.vocab_size * spec.hidden_size * dtype.itemsize
        assert predicted.read_per_step == predicted.weights - table - embed


@pytest.mark.parametrize("name", ["llama", "qwen3", "awq", "awq with biases"])
def test_weights_of_each_of_two_ranks(name: str) -> None:
    model = MODELS[name]()
    spec = load_spec(model.path)
    predicted = footprint(spec, tp=2, dtype=FP32, device="cpu", session_len=CONTEXT).weights
    for rank in range(2):
        with Checkpoint(model.path) as checkpoint:
            weights = RankWeights(checkpoint, spec, Shard.of(spec, rank, 2), FP32, "cpu", False)
            loaded = num_bytes(dict(weights), set())
        assert predicted == loaded + 2 * CONTEXT * spec.head_dim * FP32.itemsize


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    "name", ["awq gemv 64", "gptq v1", "packed channel", "packed 8 bits", "nf4 double", "fp8 block"]
)
def test_weights_of_each_format(name: str, dtype: torch.dtype, tp: int) -> None:
    spec, loaded = loaded_format(name, dtype, tp)
    predicted = footprint(spec, tp=tp, dtype=dtype, device="cpu", session_len=CONTEXT).weights
    assert predicted == loaded + 2 * CONTEXT * spec.head_dim * dtype.itemsize


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_with_act_order(tp: int) -> None:
    """Predicted without the order and, on several ranks, without knowing what fills groups up."""
    spec, loaded = loaded_format("gptq act-order", BF16, tp)
    predicted = footprint(spec, tp=tp, dtype=BF16, device="cpu", session_len=CONTEXT).weights
    assert abs(predicted - loaded) < 0.15 * loaded


def loaded_format(name: str, dtype: torch.dtype, tp: int) -> tuple[DecoderSpec, int]:
    """The spec of a model in a stored format, and the bytes of its first rank's weights."""
    model = quantised_model("llama", FORMATS[name], **AWQ, head_dim=32)
    spec = load_spec(model.path)
    with Checkpoint(model.path) as checkpoint:
        weights = RankWeights(checkpoint, spec, Shard.of(spec, 0, tp), dtype, "cpu", False)
        return spec, num_bytes(dict(weights), set())


@pytest.mark.parametrize("name", ["llama", "tied", "awq"])
def test_weights_of_each_stage(name: str) -> None:
    model = MODELS[name]()
    spec = load_spec(model.path)
    for stage in range(2):
        with Checkpoint(model.path) as checkpoint:
            shard = Shard.of(spec, 0, 1, stage, 2)
            loaded = num_bytes(
                dict(RankWeights(checkpoint, spec, shard, FP32, "cpu", False)), set()
            )
        predicted = footprint(
            spec, tp=1, dtype=FP32, device="cpu", session_len=CONTEXT, stage=stage, pp=2
        )
        assert predicted.weights == loaded + 2 * CONTEXT * spec.head_dim * FP32.itemsize


def test_gpus_keep_int4_packed(tmp_path: Path) -> None:
    """Half a byte per weight of the linears; per group of 128 a scale of two and a zero of one."""
    (tmp_path / "config.json").write_text(json.dumps(sizing.config_json("Llama 3.1 8B")))
    spec = load_spec(tmp_path)

    def of_rank(tp: int) -> Footprint:
        return footprint(spec, tp=tp, dtype=torch.float16, device="cuda", session_len=CONTEXT)

    linears = 32 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    tables = 2 * 128256 * 4096 * 2
    expected = linears // 2 + linears // 128 * 3 + tables
    assert expected < of_rank(1).weights < 1.001 * expected
    assert of_rank(1).scratch == 2 * of_rank(2).scratch == 2 * 14336 * 4096 * 2
    assert of_rank(2).weights < 0.501 * of_rank(1).weights


@pytest.mark.parametrize("name", MODELS)
def test_bytes_on_disk_without_the_files(name: str) -> None:
    model = MODELS[name]()
    with Checkpoint(model.path) as checkpoint:
        expected = sum(
            checkpoint.read(tensor).numel() * (4 if found.dtype in ("F32", "I32") else 2)
            for tensor, found in checkpoint.tensors.items()
        )
    spec = load_spec(model.path)
    assert (spec.dtype, checkpoint_bytes(spec)) == ("float32", expected)


@pytest.mark.parametrize("quant_policy", [0, 4])
@pytest.mark.parametrize("share", [0.8, 0.03, 12])
def test_blocks_of_a_worker(
    share: float | int, quant_policy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("llama", hidden_size=64).path
    spec, session_len = load_spec(path), 32
    config = EngineConfig(
        model=str(path),
        device="cpu",
        dtype="float32",
        session_len=session_len,
        max_num_seqs=3,
        cache_max_entry_count=share,
        quant_policy=quant_policy,
        weights_cache=None,
    )
    free = 1_000_000
    weights = footprint(spec, tp=1, dtype=FP32, device="cpu", session_len=session_len).weights
    memory = Memory("machine", RANK_BYTES + weights + free, None)
    monkeypatch.setattr("engine.worker.free_memory", lambda device: free)
    worker = Worker(config, ParallelGroup())
    (plan,) = Planner(spec, config, "cpu").plan(memory, num_gpus=1).rows
    assert plan.free_bytes == free
    assert plan.kv_tokens == worker.info.num_blocks * worker.info.block_size
    assert plan.num_sequences == min(3, worker.info.num_blocks // 2)
    cache = KVCache.allocate(
        spec,
        worker.info.num_blocks,
        worker.info.block_size,
        FP32,
        "cpu",
        1,
        quant_policy=quant_policy,
    )
    assert num_bytes(cache, set()) == plan.kv_tokens * plan.kv_bytes_per_token
    block_bytes = bytes_per_block(spec, 16, FP32, 1, quant_policy=quant_policy)
    assert plan.kv_bytes_per_token * 16 == block_bytes


# -- the arithmetic ----------------------------------------------------------------------------


def test_the_bound_is_bandwidth_over_bytes_read() -> None:
    path = MODELS["llama"]().path
    spec, config = load_spec(path), EngineConfig(model=str(path), max_num_seqs=4, dtype="float32")
    (plan, *_) = Planner(spec, config, "cuda").plan(Memory("gpu", 2 * RANK_BYTES, 1e9)).rows
    read = footprint(spec, tp=1, dtype=FP32, device="cuda", session_len=CONTEXT).read_per_step
    kv = CONTEXT * plan.kv_bytes_per_token
    assert plan.decode_bound == 1e9 / (read + kv)
    assert plan.decode_bound_all == 4e9 / (read + 4 * kv)


def test_the_fullest_stage_decides() -> None:
    path = tiny_model("llama", num_hidden_layers=3).path
    spec, memory = load_spec(path), Memory("gpu", 2 * RANK_BYTES, 1e9)
    config = EngineConfig(model=str(path), max_num_seqs=4, dtype="float32", pp=2)
    (plan,) = Planner(spec, config, "cuda").plan(memory, num_gpus=2).rows
    stages = [
        footprint(spec, tp=1, dtype=FP32, device="cuda", session_len=CONTEXT, stage=stage, pp=2)
        for stage in range(2)
    ]
    assert plan.num_replicas == 1
    assert plan.weight_bytes == max(stage.weights for stage in stages)
    assert plan.kv_bytes_per_token == 2 * bytes_per_block(spec, 1, FP32, 1) / 3
    kv = CONTEXT * bytes_per_block(spec, 1, FP32, 1)
    assert plan.decode_bound == 1e9 / (sum(stage.read_per_step for stage in stages) + kv)
    assert plan.decode_bound_all is not None
    assert plan.decode_bound_all > plan.decode_bound


def test_ranks_of_a_cpu_share_its_memory_and_gpus_do_not() -> None:
    path = MODELS["llama"]().path
    spec, config = load_spec(path), EngineConfig(model=str(path), dtype="float32")
    memory = Memory("any", 8 * RANK_BYTES, None)
    sharing_of: dict[Device, int] = {"cpu": 2, "cuda": 1}
    for device, sharing in sharing_of.items():
        row = Planner(spec, config, device).plan(memory, num_gpus=2).rows[-1]
        assert row.tp == 2
        assert row.free_bytes == memory.num_bytes - sharing * (RANK_BYTES + row.weight_bytes)


def test_sizes() -> None:
    assert read_size("80GiB") == 80 * 1024**3
    assert read_size("1.5GB") == 1_500_000_000


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def config_alone(tmp_path: Path) -> Path:
    path = tmp_path / "some-model-awq"
    path.mkdir()
    config = MODELS["awq"]().config()
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    return path


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, args)], terminal_width=200)
    return result.exit_code, result.output


def test_a_config_is_enough(config_alone: Path) -> None:
    code, text = run(config_alone / "config.json", "--gpu", "T4-16GB", "--gpus", 4)
    assert code == 0
    assert text.startswith("some-model-awq: 2 layers, 4 heads on 2, int4 in groups of 32;")
    assert "bounds, not forecasts" in text
    assert "--tp 1 fits: 256 sequences of 128 tokens." in text


def test_json(config_alone: Path) -> None:
    code, text = run(config_alone, "--memory", "16GiB", "--gpus", 2, "--session-len", 64, "--json")
    plan = json.loads(text)
    assert code == 0
    assert (plan["best_tp"], plan["session_len"], plan["dtype"]) == (1, 64, "float16")
    assert [(row["tp"], row["num_replicas"]) for row in plan["plans"]] == [(1, 2), (2, 1)]
    assert plan["plans"][0]["decode_bound"] is None
    assert plan["checkpoint_bytes"] == checkpoint_bytes(load_spec(config_alone))
    index = {"metadata": {"total_size": 123}, "weight_map": {}}
    (config_alone / "model.safetensors.index.json").write_text(json.dumps(index))
    assert json.loads(run(config_alone, "--cpu", "--json")[1])["checkpoint_bytes"] == 123


def test_what_does_not_fit_ends_with_1(config_alone: Path) -> None:
    code, text = run(config_alone, "--memory", "500MiB")
    assert code == 1
    assert "fits: the weights leave no room" in text
    code, text = run(config_alone, "--memory", "16GiB", "--cache-max-entry-count", 2)
    assert code == 0
    code, text = run(config_alone, "--cpu", "--cache-max-entry-count", 2)
    assert code == 1
    assert "holds 32 (--session-len)" in text


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ([], "--gpu H100-80GB, --memory 80GiB or --cpu"),
        (["--gpu", "H100"], "did you mean 'H100-80GB'"),
        (["--gpu", "T4-16GB", "--memory", "1GiB"], "--memory and --bandwidth describe"),
        (["--memory", "80"], "a size such as 80GiB"),
        (["--cpu", "--gpus", 2], "drop --gpu"),
        (["--cpu", "--session-len", 1000], "beyond the 128 positions"),
        (["--cpu", "--dtype", "float16"], "float16 needs a GPU"),
    ],
)
def test_refusals(config_alone: Path, args: list[object], reason: str) -> None:
    code, text = run(config_alone, *args)
    assert code == 1
    assert reason in text
    assert text.count("\n") == 1


def test_an_engine_config_is_planned_with_its_numbers(config_alone: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine.yaml"
    engine.write_text("model: elsewhere\nsession_len: 32\nmax_num_seqs: 7\n")
    text = run(config_alone, "--memory", "16GiB", "--config", engine)[1]
    assert "--tp 1 fits: 7 sequences of 32 tokens." in text


def test_the_sizing_table_of_the_docs_is_todays() -> None:
    assert sizing.PAGE.read_text() == sizing.page(), "run python -m tools.sizing"
