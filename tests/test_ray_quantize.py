"""Quantising over Ray actors: what one process does, within the rounding of sums."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError, EngineDeadError
from engine.models import load_spec
from engine.quantize import recipes
from engine.quantize.layer import STAGES
from engine.quantize.model import DenseModel
from engine.quantize.source import Source
from engine.quantize.staging import Staging
from engine.quantize.statistics import LocalCalibration
from engine.ray_quantize import RayStates
from engine.ray_rows import shared_method
from engine.weights.checkpoint import Checkpoint
from tests.command_line import manta
from tests.dequantized import dequantized_weights
from tests.quantize_jobs import SIZES, EndsIn, make_job, samples
from tests.tiny_models import TinyModel, tiny_model, write_servable_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

GROUP = 32
RECIPES = {
    "awq": recipes.awq(GROUP, False),
    "gptq": recipes.gptq(GROUP, True, desc_act=True),
    "smooth_quant": recipes.smooth_quant("int8", 0.5),
    "sparsegpt": recipes.prune("2:4", "sparsegpt"),
}


@pytest.fixture
def model() -> TinyModel:
    return tiny_model("llama", **SIZES)


@pytest.fixture
def states(model: TinyModel) -> Iterator[RayStates]:
    with RayStates(load_spec(model.path), num_workers=2) as found:
        yield found


def test_statistics_and_states_are_those_of_one_process(
    model: TinyModel, states: RayStates, tmp_path: Path
) -> None:
    """Also when a layer changes between its stages, in place or not, as methods change it."""
    with DenseModel(Checkpoint(model.path), load_spec(model.path)) as dense:
        hidden = dense.embed(samples())
        local, remote = LocalCalibration(hidden.clone()), states.start(hidden)
        for index in range(2):
            layer = dense.layer(index)
            for stage, roles in STAGES.items():
                expected, found = local.statistics(layer, stage), remote.statistics(layer, stage)
                assert found.num_tokens == expected.num_tokens
                torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(found.abs_sum, expected.abs_sum)
                torch.testing.assert_close(found.abs_max, expected.abs_max)
                layer.weights[roles[0]] = layer.weights[roles[0]] * 1.1
                layer.weights[roles[-1]].mul_(0.9)
            layer.norms["post_attention_norm"].mul_(1.01)
            local.advance(layer)
            remote.advance(layer)
        remote.save(tmp_path / "states")
        saved = LocalCalibration.load(tmp_path / "states").hidden
        torch.testing.assert_close(saved, local.hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_is_that_of_one_process(
    name: str, model: TinyModel, states: RayStates, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    # More tokens than inputs: with fewer the Gram matrix has no inverse but for the damping, and
    # GPTQ and SparseGPT make much of its rounding.
    ids = torch.randint(3, 131, (12, 40), generator=torch.Generator().manual_seed(2))
    make_job(model.path, tmp_path / "one", recipe, samples=ids).run()
    method = recipe.method if name == "smooth_quant" else shared_method(recipe.method, states, 2)
    shared: Any = {"method": method, "states": states, "samples": ids}
    make_job(model.path, tmp_path / "two", recipe, **shared).run()
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for module, weight in one.items():
        scale = weight.abs().amax()
        # A weight that lies between two levels may fall to either side.
        changed = (two[module] - weight).abs() > 1e-3 * scale
        assert float(changed.float().mean()) < 0.02, module


def weights_of(path: Path) -> dict[str, Tensor]:
    if load_spec(path).quantization is not None:
        return dequantized_weights(path)
    with Checkpoint(path) as checkpoint:
        names = [name for name in checkpoint.tensors if "_proj" in name]
        return {name: checkpoint.read(name) for name in names}


def test_a_dead_worker_is_named_and_any_number_of_them_goes_on(
    model: TinyModel, states: RayStates, tmp_path: Path
) -> None:
    recipe, out = RECIPES["awq"], tmp_path / "out"

    def kill_worker() -> None:
        (pid,) = states.compute(worker_pid, [torch.zeros(1)])
        os.kill(pid, signal.SIGKILL)

    method = EndsIn(recipe.method, 1, kill_worker)
    with pytest.raises(EngineDeadError, match=r"a worker of the calibration died.*goes on after"):
        make_job(model.path, out, recipe, method=method, states=states).run()
    assert not out.exists()
    assert Staging(out).num_layers() == 1
    assert make_job(model.path, out, recipe).run().num_layers == 2


def worker_pid(_: Tensor) -> int:
    return os.getpid()


def test_fewer_samples_than_workers(model: TinyModel, tmp_path: Path) -> None:
    with (
        RayStates(Source.open(model.path).spec, num_workers=4) as states,
        pytest.raises(ConfigError, match="--num-workers 4 is more than the 3 calibration samples"),
    ):
        make_job(model.path, tmp_path / "out", RECIPES["awq"], states=states).run()


def test_a_worker_s_error_is_ours(model: TinyModel, states: RayStates) -> None:
    with DenseModel(Checkpoint(model.path), load_spec(model.path)) as dense:
        remote = states.start(dense.embed(samples()))
        layer = dense.layer(0)
        layer.weights["q"][0, 0] = torch.nan
        with pytest.raises(CheckpointError, match="inputs of o are not finite"):
            remote.statistics(layer, "o")


def test_the_command_line(tmp_path: Path) -> None:
    write_servable_model("llama", tmp_path / "dense", hidden_size=64, intermediate_size=128)
    args = "--w-group-size 32 --calib-samples 4 --calib-seqlen 32 --num-workers 2 --tp 2 --no-eval"
    out = str(tmp_path / "out")
    code, text = manta(
        "lite", "auto_awq", str(tmp_path / "dense"), "--work-dir", out, *args.split()
    )
    assert code == 0, text
    assert load_spec(out).quantization is not None
