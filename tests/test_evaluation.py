"""Evaluation: perplexity, KL, agreement and hidden states as transformers' own forward gives them.

The losses of quantised keys and values are compared with the engine's decoder over its own cache.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.kv_cache import KVCache
from engine.models import load_decoder, load_spec
from engine.parallel import ParallelGroup
from engine.quantize import evaluation
from engine.quantize.calibration import HeldOut
from engine.quantize.comparison import Comparison, Evaluation
from engine.quantize.evaluation import evaluate, weight_bytes
from engine.quantize.kv_loss import bytes_per_token, kv_loss
from kernels.attention import AttentionMetadata
from tests.quantised_models import quantised_model
from tests.stored_formats import FORMATS
from tests.tiny_models import (
    FAMILIES,
    TinyModel,
    copy_model,
    tiny_model,
    write_servable_model,
    write_tiny_model,
)

IDS = torch.randint(3, 131, (3, 24), generator=torch.Generator().manual_seed(1))
HELD_OUT = HeldOut.all_of(IDS)


def log_probabilities(model: Any, ids: Tensor) -> np.ndarray[Any, Any]:
    """float64 [E * (T - 1), V] of what follows each token but the last, by transformers."""
    with torch.inference_mode():
        logits = model(ids).logits[:, :-1].flatten(0, 1).numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def perplexity(log_p: np.ndarray[Any, Any], ids: Tensor) -> float:
    targets = ids[:, 1:].flatten().numpy()
    return float(np.exp(-log_p[np.arange(len(targets)), targets].mean()))


def expect_losses(
    found: Evaluation, ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], ids: Tensor
) -> None:
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    assert found.num_tokens == len(kl)
    assert found.perplexity == pytest.approx(perplexity(ours, ids), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(perplexity(theirs, ids), rel=1e-4)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3, abs=1e-7)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3, abs=1e-6)
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    assert found.top1_agreement == pytest.approx(agreed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_beside_the_one_it_came_from(family: str) -> None:
    original, quantised = tiny_model(family), tiny_model(family, 8)
    found = evaluate(quantised.path, original.path, HELD_OUT, batch_size=2)
    theirs = log_probabilities(original.reference, IDS)
    expect_losses(found, log_probabilities(quantised.reference, IDS), theirs, IDS)
    assert found.kl_mean is not None
    assert found.kl_mean > 1e-3  # the comparison is not of a model with itself


def test_only_tokens_that_count_are_measured() -> None:
    original, quantised = tiny_model("llama"), tiny_model("llama", 8)
    counted = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    found = evaluate(quantised.path, original.path, HeldOut(IDS, counted))
    theirs = log_probabilities(original.reference, IDS)
    ours = log_probabilities(quantised.reference, IDS)
    kept = counted[:, 1:].flatten().numpy()
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)[kept]
    targets = IDS[:, 1:].flatten().numpy()[kept]
    assert found.num_tokens == kept.sum()
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    loss = -ours[kept][np.arange(len(targets)), targets].mean()
    assert found.perplexity == pytest.approx(np.exp(loss), rel=1e-4)


def test_hidden_states_drift_as_transformers_says() -> None:
    original, quantised = tiny_model("llama"), tiny_model("llama", 8)
    found = evaluate(quantised.path, original.path, HELD_OUT)
    norms = []
    for model in (original.reference, quantised.reference):
        states: list[Tensor] = []  # the layers' own outputs: the last of `hidden_states` is normed
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out, states=states: states.append(out))
            for layer in model.model.layers
        ]
        log_probabilities(model, IDS)
        for hook in hooks:
            hook.remove()
        norms.append(states)
    expected = [
        float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in zip(*norms, strict=True)
    ]
    assert found.hidden_errors == pytest.approx(expected, rel=1e-3)


def test_a_model_alone_has_its_perplexity() -> None:
    model = tiny_model("qwen3", 8)
    found = evaluate(model.path, None, HELD_OUT)
    assert found.perplexity == pytest.approx(
        perplexity(log_probabilities(model.reference, IDS), IDS), rel=1e-4
    )
    assert found == Evaluation(num_tokens=69, perplexity=found.perplexity)


@pytest.mark.parametrize("name", FORMATS)
def test_any_stored_format_is_measured(name: str) -> None:
    model = quantised_model("llama", FORMATS[name], hidden_size=64, intermediate_size=192)
    found = evaluate(model.path, None, HELD_OUT)
    log_p = log_probabilities(model.reference, IDS)
    assert found.perplexity == pytest.approx(perplexity(log_p, IDS), rel=1e-3)


@pytest.mark.parametrize("name", ["gptq v2", "int8 channel"])
def test_a_quantised_head_is_the_one_that_is_measured(name: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 136}
    model = quantised_model("llama", FORMATS[name], head=True, **sizes)
    settings = model.config()["quantization_config"]
    model.edit_config(quantization_config=settings | {"lm_head": True, "ignore": []})
    log_p = log_probabilities(model.reference, IDS)
    found = evaluate(model.path, None, HELD_OUT)
    assert found.perplexity == pytest.approx(perplexity(log_p, IDS), rel=1e-3)


def test_a_model_beside_itself_loses_nothing() -> None:
    model = tiny_model("llama")
    found = evaluate(model.path, model.path, HELD_OUT)
    assert found.kl_mean == found.kl_p99 == 0.0
    assert found.top1_agreement == 1.0
    assert found.perplexity == found.reference_perplexity
    assert found.hidden_errors == (0.0, 0.0)


def test_chunks_of_logits_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = tiny_model("mistral", 8).path, tiny_model("mistral").path
    whole = evaluate(*paths, HELD_OUT, batch_size=3)
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 5 * 131 + 1)  # five tokens at once
    monkeypatch.setattr("engine.quantize.comparison.MAX_WIDE", 2 * 131)
    parts = evaluate(*paths, HELD_OUT)
    assert parts.num_tokens == whole.num_tokens
    assert parts.kl_mean == pytest.approx(whole.kl_mean, rel=1e-5)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.hidden_errors == pytest.approx(whole.hidden_errors, rel=1e-4)


def test_a_head_in_half_precision_is_widened_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model("llama", tmp_path / "model")
    tensors = load_file(model.path / "model.safetensors")
    head = tensors["lm_head.weight"].to(torch.bfloat16)
    save_file(tensors | {"lm_head.weight": head}, model.path / "model.safetensors")
    model.reference.lm_head.weight.data.copy_(head)
    monkeypatch.setattr("engine.quantize.model.TABLE_ROWS", 50)  # of 131
    found = evaluate(model.path, tiny_model("llama", 8).path, HELD_OUT)
    theirs = log_probabilities(tiny_model("llama", 8).reference, IDS)
    expect_losses(found, log_probabilities(model.reference, IDS), theirs, IDS)


def test_progress_counts_to_its_end() -> None:
    steps: list[tuple[int, int]] = []
    model = tiny_model("llama")
    evaluate(model.path, model.path, HELD_OUT, progress=lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert steps[-1] == (6, 6)


def test_models_of_other_shapes_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(CheckpointError, match=r"a vocab_size of 131 and the reference .* 140"):
        evaluate(model.path, tiny_model("llama", vocab_size=140).path, HELD_OUT)
    with pytest.raises(CheckpointError, match=r"a num_layers of 2 and the reference .* 1"):
        evaluate(model.path, tiny_model("llama", num_hidden_layers=1).path, HELD_OUT)


def test_another_vocabulary_of_equal_size_is_refused(tmp_path: Path) -> None:
    model = write_servable_model("llama", tmp_path / "model")
    other = TinyModel(tmp_path / "other", model.reference)
    shutil.copytree(model.path, other.path)
    file = other.path / "tokenizer.json"
    text = file.read_text()
    file.write_text(text + "\n")  # other bytes, the same vocabulary
    assert evaluate(model.path, other.path, HELD_OUT).kl_mean == 0.0
    file.write_text(text.replace('"A":', '"swap":').replace('"B":', '"A":').replace("swap", "B"))
    with pytest.raises(CheckpointError, match="different vocabularies"):
        evaluate(model.path, other.path, HELD_OUT)


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        evaluate(tiny_model("llama").path, tmp_path / "none", HELD_OUT)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the token id 131, and the model has a vocabulary"):
        evaluate(tiny_model("llama").path, None, HeldOut.all_of(torch.full((1, 8), 131)))


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = copy_model(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(model.path / "model.safetensors")
    tensors["model.norm.weight"][5] = torch.inf
    save_file(tensors, model.path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model: its logits are not finite"):
        evaluate(model.path, None, HELD_OUT)


def test_weight_bytes_are_the_files() -> None:
    model = tiny_model("llama")
    assert weight_bytes(model.path) == (model.path / "model.safetensors").stat().st_size


def cache_log_probabilities(model: TinyModel, policy: int, ids: Tensor) -> np.ndarray[Any, Any]:
    """As the engine computes them: a prefill over its own cache."""
    spec = load_spec(model.path)
    decoder = load_decoder(
        model.path, spec, dtype=torch.float32, device="cpu", group=ParallelGroup()
    )
    rows = []
    for row in ids:
        length = len(row)
        cache = KVCache.allocate(spec, 2, 16, torch.float32, "cpu", 1, quant_policy=policy)
        meta = AttentionMetadata.build(
            query_start_loc=np.array([0, length], dtype=np.int32),
            context_lens=np.array([length], dtype=np.int32),
            block_tables=np.arange(2, dtype=np.int32)[None],
            slot_mapping=np.arange(length, dtype=np.int32),
            num_decodes=0,
            block_size=16,
            device="cpu",
        )
        logits = decoder.logits(decoder.forward(row, torch.arange(length), meta, cache))
        assert logits is not None
        rows.append(logits[:-1].double().log_softmax(-1).numpy())
    return np.concatenate(rows)


@pytest.mark.parametrize("family", ["qwen3", "internlm2"])
def test_quantised_caches_lose_what_they_lose_in_the_engine(family: str) -> None:
    sizes = {"head_dim": 32} if family == "qwen3" else {"hidden_size": 64}
    model = tiny_model(family, **sizes)
    found = kv_loss(model.path, (8, 4, 16), HELD_OUT, batch_size=3)
    plain = cache_log_probabilities(model, 0, IDS)
    for policy, losses in found.items():
        ours = cache_log_probabilities(model, policy, IDS)
        kl = (np.exp(plain) * (plain - ours)).sum(-1)
        # A value on the edge between two steps may fall on either side.
        assert losses.kl_mean == pytest.approx(kl.mean(), rel=0.05)
        assert losses.perplexity == pytest.approx(perplexity(ours, IDS), rel=1e-2)
        assert losses.top1_agreement == pytest.approx(
            (ours.argmax(-1) == plain.argmax(-1)).mean(), abs=0.03
        )
    assert found[8].kl_mean < found[16].kl_mean < found[4].kl_mean  # type: ignore[operator]


def test_policies_without_a_quantised_cache_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"quant_policy must be one of .* got 0"):
        kv_loss(model.path, (0,), HELD_OUT)
    with pytest.raises(ConfigError, match="needs a head size that is a multiple of 16"):
        kv_loss(model.path, (8,), HELD_OUT)


def test_bytes_per_token_of_a_cache() -> None:
    model = tiny_model("qwen3", head_dim=32)  # 2 layers of 2 kv heads
    assert bytes_per_token(model.path, (0, 8, 4)) == {
        0: 2 * 2 * 2 * 32 * 2,
        8: 2 * 2 * 2 * (32 + 4),
        4: 2 * 2 * 2 * (16 + 4),
    }


def test_a_comparison_of_distributions_by_hand() -> None:
    true, found = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    added = Comparison("model")
    logits, reference = (torch.tensor(np.log(p)) for p in (found, true))
    added.add(logits, torch.tensor([2]), reference)
    assert added.evaluation().kl_mean == pytest.approx(0.25 * np.log(2))
    assert added.evaluation().perplexity == pytest.approx(4)
    assert added.evaluation().top1_agreement == 0.0
