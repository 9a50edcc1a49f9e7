"""The two random checkpoints of the benchmarks are one model, for the engine and transformers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.random_checkpoint import LlamaShape, write_awq, write_checkpoints
from tests.paged_decoding import PagedDecoder

SHAPE = LlamaShape(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=64,
    group_size=32,
)
PROMPT = [5, 77, 31, 2, 90, 14]


def test_both_checkpoints_compute_the_same(tmp_path: Path) -> None:
    awq, bf16 = write_checkpoints(tmp_path, SHAPE)
    model = AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    found = PagedDecoder(awq).logits(PROMPT)
    # The twin's weights were rounded to bf16, a relative 2^-9 each.
    assert (found - expected).norm() < 4e-3 * expected.norm()


def test_a_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_checkpoints(tmp_path / name, SHAPE, seed=3)
    for file in ("awq/model.safetensors", "bf16/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_random_words_are_a_model(tmp_path: Path) -> None:
    logits = PagedDecoder(write_awq(tmp_path, SHAPE)).logits(PROMPT)
    assert logits.isfinite().all()
    assert logits.std() > 0
