"""A wrong checkpoint is refused by file, tensor and shape; harmless extras are tolerated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.models import load_spec
from engine.weights.checkpoint import Checkpoint
from kernels.dense_linear import DenseWeight
from tests.paged_decoding import PagedDecoder
from tests.test_families import PROMPT, reference_logits
from tests.tiny_models import TinyModel, copy_model, tiny_model

Tensors = dict[str, Tensor]
Q = "model.layers.1.self_attn.q_proj"
ODD = {"intermediate_size": 96}  # AWQ wants multiples of 8 and of the group


def damaged(
    directory: Path, change: Callable[[Tensors], Any], group_size: int | None = None
) -> TinyModel:
    """A copy of a tiny model whose tensors `change` has edited in place."""
    model = copy_model(tiny_model("llama", group_size, **ODD), directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return model


def refusal(path: Path) -> str:
    """The message with which loading is refused."""
    with pytest.raises(CheckpointError) as caught:
        PagedDecoder(path)
    return str(caught.value)


def split_model(directory: Path) -> dict[str, Any]:
    """Rewrite a copied model as two files and an index; returns the index."""
    copy_model(tiny_model("llama", **ODD), directory)
    single = directory / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {
        name: f"model-{1 + (i >= len(names) // 2)}.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_missing_tensor(tmp_path: Path) -> None:
    damaged(tmp_path, lambda tensors: tensors.pop(f"{Q}.weight"))
    assert f"{Q}.weight [48, 48] is missing" in refusal(tmp_path)


def test_surplus_tensor(tmp_path: Path) -> None:
    damaged(tmp_path, lambda tensors: tensors.update({f"{Q}.bias": torch.zeros(48)}))
    assert f"model.safetensors: the tensor {Q}.bias [48] has no place" in refusal(tmp_path)


def test_wrong_shape(tmp_path: Path) -> None:
    damaged(tmp_path, lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(48, 40)}))
    assert f"{Q}.weight should be [48, 48]" in refusal(tmp_path)
    assert "found [48, 40] of F32" in refusal(tmp_path)


def test_wrong_dtype(tmp_path: Path) -> None:
    damaged(
        tmp_path,
        lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(48, 48, dtype=torch.int8)}),
    )
    assert "of BF16 or F16 or F32, found [48, 48] of I8" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_wrong_int4_tensor(name: str, tmp_path: Path) -> None:
    damaged(tmp_path, lambda t: t.update({f"{Q}.{name}": t[f"{Q}.{name}"][1:].clone()}), 16)
    message = refusal(tmp_path)
    assert f"model.safetensors: the tensor {Q}.{name} should be" in message


def test_head_without_tie_is_required(tmp_path: Path) -> None:
    damaged(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight [131, 48] is missing" in refusal(tmp_path)


def test_harmless_tensors_are_tolerated(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = damaged(tmp_path, lambda tensors: tensors.update({name: torch.zeros(6)}))
    torch.testing.assert_close(
        PagedDecoder(tmp_path).logits(PROMPT), reference_logits(model, PROMPT), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("differs", [False, True])
def test_tied_head_that_is_stored_too(differs: bool, tmp_path: Path) -> None:
    """As transformers does: an equal copy is shared, a different one is the head."""
    model = damaged(
        tmp_path,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + float(differs)}),
    )
    model.edit_config(tie_word_embeddings=True)
    decoder = PagedDecoder(tmp_path).decoder
    assert decoder.head is not None
    assert decoder.embed is not None
    head = decoder.head.linear.weight
    assert isinstance(head, DenseWeight)
    assert (head.data is decoder.embed.weight) is not differs
    assert torch.equal(head.data, decoder.embed.weight + float(differs))


@pytest.mark.parametrize("keep", [0, 6, 100, -1])
def test_truncated_file(keep: int, tmp_path: Path) -> None:
    copy_model(tiny_model("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} (" in refusal(tmp_path)
    assert "truncated or not a safetensors file" in refusal(tmp_path)


def test_index_reads_like_a_single_file(tmp_path: Path) -> None:
    split_model(tmp_path)
    whole = PagedDecoder(tiny_model("llama", **ODD).path).logits(PROMPT)
    assert torch.equal(PagedDecoder(tmp_path).logits(PROMPT), whole)


def test_index_names_an_absent_file(tmp_path: Path) -> None:
    split_model(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    message = "model.safetensors.index.json names model-2.safetensors, which does not exist"
    assert message in refusal(tmp_path)


def test_index_decides_between_two_copies(tmp_path: Path) -> None:
    index = split_model(tmp_path)
    name = next(n for n, file in index["weight_map"].items() if file == "model-1.safetensors")
    second = load_file(tmp_path / "model-2.safetensors")
    shape = load_file(tmp_path / "model-1.safetensors")[name].shape
    save_file(second | {name: torch.zeros(shape)}, tmp_path / "model-2.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read(name).any()


def test_index_misplaces_a_tensor(tmp_path: Path) -> None:
    index = split_model(tmp_path)
    index["weight_map"]["model.extra.weight"] = "model-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = "places the tensor model.extra.weight in model-1.safetensors, which lacks it"
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_broken_index(text: str, tmp_path: Path) -> None:
    split_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_pickle_weights(tmp_path: Path) -> None:
    copy_model(tiny_model("llama"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickle weights only (pytorch_model.bin)" in refusal(tmp_path)
    assert "convert them to safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "aqlm", "bits": 4}, "quant_method 'aqlm' is not supported; allowed: awq"),
        ({"bits": 4, "group_size": 16}, "quant_method 'unknown'"),
        (
            {"quant_method": "awq", "version": "gemv_fast", "bits": 4},
            "version must be one of gemm, gemv",
        ),
        ({"quant_method": "awq", "bits": 8, "group_size": 16}, "bits must be 4, got 8"),
        ({"quant_method": "awq", "bits": 4}, "'group_size' is missing"),
        ({"quant_method": "awq", "bits": 4, "group_size": -2}, "group_size must be an integer"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "or -1 for one group of all"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": False},
            "zero_point must be true",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 16, "modules_to_not_convert": "up"},
            "modules_to_not_convert must be a list",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32},
            "self_attn.q_proj: 48 inputs are not a multiple of AWQ's group_size 32",
        ),
    ],
)
def test_quantization_that_cannot_be_read(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    copy_model(tiny_model("llama", 16, **ODD), tmp_path).edit_config(quantization_config=settings)
    assert message in refusal(tmp_path)


def test_int4_outputs_must_fill_words(tmp_path: Path) -> None:
    copy_model(tiny_model("llama", 16, **ODD), tmp_path).edit_config(intermediate_size=100)
    assert "gate_proj: 100 outputs are not a multiple of 8" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "quant_config.json", "quantize_config.json"])
def test_both_spellings_of_awq_settings(file: str, tmp_path: Path) -> None:
    model = copy_model(tiny_model("llama", 16, **ODD), tmp_path)
    settings = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    if file == "config.json":
        model.edit_config(quantization_config=settings)
    else:
        model.edit_config(quantization_config=...)
        (tmp_path / file).write_text(json.dumps(settings))
    assert load_spec(tmp_path) == load_spec(tiny_model("llama", 16, **ODD).path)


@pytest.mark.parametrize("skipped", ["mlp", "k_proj", "layers.1"])
def test_modules_that_were_not_converted(skipped: str, tmp_path: Path) -> None:
    """Dense linears beside int4 ones, also within one fused qkv."""
    model = tiny_model("llama", 16, **ODD)
    dense = model.reference.state_dict()

    def restore(tensors: Tensors) -> None:
        for name in [n for n in tensors if skipped in n and n.endswith(".qweight")]:
            module = name.removesuffix(".qweight")
            for part in ("qweight", "qzeros", "scales"):
                del tensors[f"{module}.{part}"]
            tensors[f"{module}.weight"] = dense[f"{module}.weight"].clone()

    settings = model.config()["quantization_config"] | {"modules_to_not_convert": [skipped]}
    damaged(tmp_path, restore, 16).edit_config(quantization_config=settings)
    torch.testing.assert_close(
        PagedDecoder(tmp_path).logits(PROMPT), reference_logits(model, PROMPT), rtol=1e-4, atol=1e-4
    )


def test_a_part_is_read_as_the_whole_is_cut() -> None:
    path = tiny_model("llama").path
    whole = load_file(path / "model.safetensors")
    with Checkpoint(path) as checkpoint:
        part = checkpoint.read(f"{Q}.weight", slice(8, 20), slice(4, 44))
        assert torch.equal(part, whole[f"{Q}.weight"][8:20, 4:44])
        part = checkpoint.read("model.norm.weight", slice(3, 5))
        assert torch.equal(part, whole["model.norm.weight"][3:5])
