"""A model of dense layers gives transformers' hidden states and logits, in float32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.models import load_spec
from engine.quantize.job import LocalStates
from engine.quantize.layer import STAGES, DenseLayer
from engine.quantize.model import DenseModel
from engine.quantize.statistics import LocalCalibration, Statistics
from engine.weights.checkpoint import Checkpoint
from tests.tiny_models import FAMILIES, TinyModel, copy_model, tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    **{family: (family, None, {}) for family in FAMILIES},
    "tied": ("llama", None, {"tie_word_embeddings": True}),
    "biases": ("llama", None, {"attention_bias": True, "mlp_bias": True}),
    "internlm2 bias": ("internlm2", None, {"attention_bias": True}),
    "no grouping": ("llama", None, {"num_key_value_heads": 4}),
    "window": ("mistral", None, {"sliding_window": 7}),
    "windows": (
        "qwen3",
        None,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "dynamic": ("llama", None, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn": ("llama", None, {"rope_parameters": YARN}),
    "awq": ("qwen2", 8, {}),
    "awq internlm2": ("internlm2", 8, {"intermediate_size": 96}),
}
IDS = torch.randint(3, 131, (3, 20), generator=torch.Generator().manual_seed(5))


def open_model(path: Path) -> DenseModel:
    return DenseModel(Checkpoint(path), load_spec(path))


@torch.no_grad()
def reference_states(model: TinyModel) -> tuple[list[Tensor], Tensor]:
    """The inputs of every layer, and the logits."""
    output = model.reference(IDS, output_hidden_states=True)
    return list(output.hidden_states), output.logits


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits_equal_transformers(case: str) -> None:
    family, group_size, config = CASES[case]
    reference = tiny_model(family, group_size, **config)
    states, logits = reference_states(reference)
    with open_model(reference.path) as model:
        hidden = model.embed(IDS)
        for index in range(model.spec.num_layers):
            torch.testing.assert_close(hidden, states[index], rtol=1e-4, atol=1e-4)
            hidden = model.layer(index).forward(hidden)
        torch.testing.assert_close(model.logits(hidden), logits, rtol=1e-4, atol=1e-4)


def test_attention_in_parts_of_the_batch_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(tiny_model("llama").path) as model:
        hidden, layer = model.embed(IDS), model.layer(0)
    whole = layer.forward(hidden)
    monkeypatch.setattr("engine.quantize.layer.MAX_SCORES", 4 * 20**2)
    torch.testing.assert_close(layer.forward(hidden), whole)


def test_bfloat16_is_near_float32() -> None:
    path = tiny_model("qwen3").path
    with Checkpoint(path) as checkpoint:
        exact = DenseModel(checkpoint, load_spec(path))
        rounded = DenseModel(checkpoint, load_spec(path), torch.bfloat16)
        expected = exact.layer(0).forward(exact.embed(IDS))
        found = rounded.layer(0).forward(rounded.embed(IDS))
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.02


@pytest.mark.parametrize("name", ["self_attn.v_proj.weight", "post_attention_layernorm.weight"])
def test_a_weight_that_is_nan_is_named(tmp_path: Path, name: str) -> None:
    model = copy_model(tiny_model("llama"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.1.{name}"].view(-1)[5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with open_model(model.path) as opened:
        opened.layer(0)
        with pytest.raises(CheckpointError, match=r"layers\.1\..* holds 1 values that are NaN"):
            opened.layer(1)


@pytest.mark.parametrize("family", ["llama", "internlm2"])
def test_statistics_are_those_of_the_inputs_transformers_multiplies(family: str) -> None:
    reference = tiny_model(family)
    seen: dict[str, Tensor] = {}

    def keep(stage: str) -> Any:
        return lambda module, inputs: seen.__setitem__(stage, inputs[0].flatten(0, 1).double())

    layers = reference.reference.model.layers
    attention, mlp = layers[1].self_attn, layers[1].mlp
    linears = (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
    hooks = [
        linear.register_forward_pre_hook(keep(stage))
        for stage, linear in zip(STAGES, linears, strict=True)
    ]
    with torch.no_grad():
        reference.reference(IDS)
    for hook in hooks:
        hook.remove()
    with open_model(reference.path) as model:
        calibration = LocalCalibration(model.embed(IDS), batch_size=2)
        calibration.advance(model.layer(0))
        layer = model.layer(1)
        for stage in STAGES:
            found, x = calibration.statistics(layer, stage), seen[stage]
            assert found.num_tokens == IDS.numel()
            torch.testing.assert_close(found.gram.double(), x.t() @ x, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(found.abs_mean.double(), x.abs().mean(0), rtol=1e-4, atol=0)
            torch.testing.assert_close(found.abs_max.double(), x.abs().amax(0), rtol=1e-4, atol=0)
        calibration.advance(layer)
        expected = layer.forward(model.layer(0).forward(model.embed(IDS)))
        torch.testing.assert_close(calibration.hidden, expected, rtol=1e-4, atol=1e-4)


def test_sums_of_parts_are_the_statistics_of_the_whole() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    whole, parts = Statistics.of(x), Statistics.of(x[:20]) + Statistics.of(x[20:])
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.abs_mean, whole.abs_mean)
    assert torch.equal(parts.abs_max, whole.abs_max)
    assert parts.num_tokens == 50
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.1])
    scaled, direct = whole.scaled(scale), Statistics.of(x * scale)
    torch.testing.assert_close(scaled.gram, direct.gram)
    torch.testing.assert_close(scaled.abs_mean, direct.abs_mean)
    torch.testing.assert_close(scaled.abs_max, direct.abs_max)


def test_a_change_of_the_layer_changes_later_statistics() -> None:
    with open_model(tiny_model("llama").path) as model:
        calibration, layer = LocalCalibration(model.embed(IDS)), model.layer(0)
    before = calibration.statistics(layer, "o")
    layer.weights["v"] *= 2
    after = calibration.statistics(layer, "o")
    torch.testing.assert_close(after.gram, before.gram * 4)


def test_saved_states_go_on_as_they_were(tmp_path: Path) -> None:
    with open_model(tiny_model("llama").path) as model:
        calibration = LocalCalibration(model.embed(IDS), batch_size=2)
        calibration.advance(model.layer(0))
        calibration.save(tmp_path / "hidden.safetensors")
        loaded = LocalCalibration.load(tmp_path / "hidden.safetensors", batch_size=2)
        for each in (calibration, loaded):
            each.advance(model.layer(1))
    assert torch.equal(loaded.hidden, calibration.hidden)


def test_a_resumed_run_takes_the_batch_size_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller one is how a run goes on that had too little memory."""
    sizes: list[int] = []
    forward = DenseLayer.add_attention

    def counted(layer: DenseLayer, hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return forward(layer, hidden)

    with open_model(tiny_model("llama").path) as model:
        LocalStates(4).start(model.embed(IDS)).save(tmp_path / "hidden.safetensors")
        calibration = LocalStates(1).load(tmp_path / "hidden.safetensors")
        monkeypatch.setattr(DenseLayer, "add_attention", counted)
        calibration.advance(model.layer(0))
    assert sizes == [1] * len(IDS)


def test_values_that_overflow_are_named() -> None:
    with open_model(tiny_model("llama").path) as model:
        layer = model.layer(0)
        layer.weights["up"].fill_(1e38)
        calibration = LocalCalibration(model.embed(IDS))
    with pytest.raises(CheckpointError, match="layer 0: the inputs of down are not finite"):
        calibration.statistics(layer, "down")


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    path = tiny_model("llama").path
    with pytest.raises(CheckpointError, match="should be"):
        DenseModel(Checkpoint(path), replace(load_spec(path), intermediate_size=80))
