"""The quality benchmark: its model, its tools' jobs and its tables, in seconds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.outlier_model import sample_text, write_outlier_model
from benchmarks.quantization import OURS, Subject, cost, kv, make, quality
from benchmarks.random_checkpoint import LlamaShape
from engine.quantize.calibration import HeldOut
from tests.paged_decoding import PagedDecoder
from tools.peers.job import Job, save_samples

SHAPE = LlamaShape(
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=256,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outlier_model(tmp_path_factory.mktemp("outliers"), SHAPE)


@pytest.fixture(scope="module")
def text(model: Path) -> torch.Tensor:
    return sample_text(model, 12, 48)


def test_channels_stand_out_and_are_the_same_in_every_layer(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    norms = [value.float() for name, value in tensors.items() if name.endswith("norm.weight")]
    assert len(norms) == 5
    largest = {tuple(sorted(norm.topk(2).indices.tolist())) for norm in norms}
    assert len(largest) == 1
    assert all(norm.max() > 5 * norm.median() for norm in norms)


def test_text_is_as_likely_as_its_model_says(model: Path, text: torch.Tensor) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        log_probabilities = reference(text).logits[:, :-1].double().log_softmax(-1)
    loss = -log_probabilities.gather(2, text[:, 1:, None]).mean()
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    assert abs(float(loss - entropy)) < 0.2  # 564 tokens: three deviations of the mean
    ours = PagedDecoder(model).logits(text[0].tolist())
    found = ours[:-1].double().log_softmax(-1)
    assert torch.allclose(found, log_probabilities[0], atol=1e-3)


def test_jobs_cross_into_another_process(tmp_path: Path) -> None:
    job = Job(model=tmp_path / "a", out=tmp_path / "b", samples=tmp_path / "c", method="awq")
    job.save(tmp_path / "job")
    assert Job.load(tmp_path / "job") == job


def test_tables_of_our_own_tool(model: Path, text: torch.Tensor, tmp_path: Path) -> None:
    save_samples(tmp_path / "samples", text[:8])
    subject = Subject("tiny", model, tmp_path / "samples", HeldOut.all_of(text[8:]), "a model")
    made = [make(tmp_path, subject, OURS, method, 32, None) for method in ("rtn", "gptq")]
    table = quality(subject, made, {})
    rtn, gptq = table.rows
    assert [row[:3] for row in table.rows] == [[OURS, "rtn", "32"], [OURS, "gptq", "32"]]
    assert 0 < float(gptq[6]) < float(rtn[6])  # KL
    assert "llmcompressor" in table.notes[0]  # not installed, and said so
    before = json.loads((tmp_path / "tiny-manta-rtn-32.json").read_text())
    again = make(tmp_path, subject, OURS, "rtn", 32, None)
    assert again.run == before  # not made twice
    assert [row[1] for row in cost(subject, made).rows] == ["rtn", "gptq"]
    assert [row[0] for row in kv(subject).rows] == ["8", "16", "4"]
