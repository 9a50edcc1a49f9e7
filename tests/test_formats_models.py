"""A model in every stored format gives transformers' tokens, on one rank and on two."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from engine.errors import CheckpointError
from engine.models import load_spec
from engine.models.rank_weights import RankWeights
from engine.models.sharding import Shard
from engine.weights.checkpoint import Checkpoint
from kernels.dense_linear import DenseWeight
from kernels.int8_linear import Int8Weight
from tests.paged_decoding import PagedDecoder, Replay, replay_rank
from tests.quantised_models import quantised_model
from tests.stored_formats import FORMATS, Stored, awq_gemm, compressed_tensors, gptq, packed
from tests.test_families import NUM_TOKENS, PROMPT, reference_greedy, reference_logits
from tests.test_tensor_parallel import free_port
from tests.tiny_models import TinyModel, copy_model, tiny_model

# Both products over two ranks cut at whole groups of 32; those of 64 end within one.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
# o's 48 inputs and down's 80 over two ranks: groups end where no kernel's do.
ODD: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 24}
CASES: dict[str, tuple[str, Stored, dict[str, Any]]] = {
    **{name: ("llama", stored, SIZES) for name, stored in FORMATS.items()},
    "qwen2, gptq act-order": ("qwen2", FORMATS["gptq act-order"], SIZES),
    "qwen2, packed asymmetric": ("qwen2", FORMATS["packed asymmetric"], SIZES),
    "internlm2, gptq act-order": ("internlm2", FORMATS["gptq act-order"], SIZES),
    "internlm2, awq gemm": ("internlm2", FORMATS["awq gemm"], SIZES),
    "internlm2, packed act-order": ("internlm2", FORMATS["packed act-order"], SIZES),
    "internlm2, nf4 double": ("internlm2", FORMATS["nf4 double"], SIZES),
    "internlm2, fp8 block": ("internlm2", FORMATS["fp8 block"], SIZES),
    "own orders": ("llama", FORMATS["gptq act-order"], SIZES),
    "awq, cut within groups": ("llama", awq_gemm(32), ODD),
    "gptq, cut within groups": ("llama", gptq(32, symmetric=True), ODD),
    "gptq act-order, cut within groups": ("qwen2", gptq(32, act_order=True), ODD),
    "packed, cut within groups": ("internlm2", packed(32, symmetric=False), ODD),
}
IN_BFLOAT16 = ("gptq act-order", "gptq act-order, cut within groups", "awq, cut within groups")


@cache
def model_of(case: str) -> TinyModel:
    family, stored, sizes = CASES[case]
    return quantised_model(family, stored, own_orders=case == "own orders", **sizes)


@cache
def tokens_of(case: str) -> list[int]:
    return reference_greedy(model_of(case), PROMPT, NUM_TOKENS)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_equals_transformers(case: str) -> None:
    model = model_of(case)
    assert_transformers_logits(model)
    assert PagedDecoder(model.path).greedy(PROMPT, NUM_TOKENS) == tokens_of(case)
    assert len(set(tokens_of(case))) > 3, "the oracle must not be a trivial loop"


def assert_transformers_logits(model: TinyModel) -> None:
    found, expected = PagedDecoder(model.path).logits(PROMPT), reference_logits(model, PROMPT)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], Tensor]:
    """Logits of the prompt and of transformers' tokens; one spawn serves all cases."""
    out = tmp_path_factory.mktemp("formats") / "logits.pt"
    keys = [(case, torch.float32) for case in CASES]
    keys += [(case, torch.bfloat16) for case in IN_BFLOAT16]
    jobs = [Replay(model_of(case).path, dtype, *in_few_steps(case)) for case, dtype in keys]
    spawn(replay_rank, (f"127.0.0.1:{free_port()}", out, jobs), nprocs=2)  # type: ignore[no-untyped-call]
    return dict(zip(keys, torch.load(out), strict=True))


def in_few_steps(case: str) -> tuple[list[int], list[int]]:
    """Prompt and output: transformers' tokens in two chunks, then one decoded, to save time."""
    *first, last = tokens_of(case)
    return PROMPT + first, [last]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_transformers(
    case: str, two_ranks: dict[tuple[str, torch.dtype], Tensor]
) -> None:
    found, tokens = two_ranks[case, torch.float32], tokens_of(case)
    expected = reference_logits(model_of(case), PROMPT + tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert found[len(PROMPT) - 1 : -1].argmax(1).tolist() == tokens


@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_two_ranks_in_bfloat16(case: str, two_ranks: dict[tuple[str, torch.dtype], Tensor]) -> None:
    """Act-order and padding in the int4 kernels, for few rows and for many."""
    found, exact = two_ranks[case, torch.bfloat16], two_ranks[case, torch.float32]
    assert (found - exact).norm() / exact.norm() < 0.1
    alone = PagedDecoder(model_of(case).path, torch.bfloat16).replay(*in_few_steps(case))
    assert alone is not None
    assert (alone - exact).norm() / exact.norm() < 0.1


def test_orders_of_their_own_are_kept_dequantised(caplog: pytest.LogCaptureFixture) -> None:
    case = "own orders"
    decoder = PagedDecoder(model_of(case).path, torch.bfloat16).decoder
    attention = decoder.layers[0].attention
    assert isinstance(attention.qkv.weight, DenseWeight)
    assert not isinstance(attention.o.linear.weight, DenseWeight)
    q = "model.layers.0.self_attn.q_proj"
    assert f"{q} and {q.replace('q_proj', 'k_proj')}" in caplog.text
    assert "4 times the memory of int4" in caplog.text


# -- settings that tell modules apart ----------------------------------------------------------


def test_dynamic_settings_of_gptq() -> None:
    """Other groups, bits and orders for some modules, none for others; q, k and v in one."""
    overrides = {
        "k_proj": gptq(64),
        "up_proj": gptq(32, bits=8),
        "down_proj": gptq(32, act_order=True),
    }
    model = quantised_model(
        "llama", gptq(32), skipped=("layers.1.mlp.gate_proj",), others=overrides, **SIZES
    )
    dynamic = {
        r"-:.*\.1\.mlp\.gate_proj": {},
        r"+:.*k_proj": {"group_size": 64},
        r".*up_proj": {"bits": 8},
        r"+:model\.layers\.\d\.mlp\.down": {"desc_act": True, "sym": True},
        r".*down_proj": {"bits": 2},  # the first that matches decides
    }
    edit_settings(model, dynamic=dynamic)
    assert_transformers_logits(model)


@pytest.mark.parametrize("key", ["modules_in_block_to_quantize", "inside_layer_modules"])
def test_modules_in_block_to_quantise(key: str) -> None:
    skipped = ("self_attn.o_proj", "mlp.up_proj")
    model = quantised_model("llama", gptq(32), skipped=skipped, **SIZES)
    attention = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]
    edit_settings(model, **{key: [attention, ["mlp.gate_proj"], ["mlp.down_proj"]]})
    assert_transformers_logits(model)


def test_groups_of_compressed_tensors() -> None:
    """A name before a pattern, a pattern before the class; `ignore` before all."""
    layer = "model.layers.0.mlp"
    others = {
        f"{layer}.up_proj": FORMATS["packed 8 bits"],
        "mlp.up_proj": FORMATS["packed asymmetric"],
        "self_attn.o_proj": FORMATS["fp8 channel"],
    }
    model = quantised_model(
        "llama", packed(32), skipped=("1.mlp.gate_proj",), others=others, **SIZES
    )

    def group(name: str, *targets: str) -> dict[str, Any]:
        settings = FORMATS[name].settings
        scheme = settings["config_groups"]["group_0"]
        return {**scheme, "targets": list(targets), "format": settings["format"]}

    groups = {
        "a": group("packed", "Linear"),
        "b": group("packed asymmetric", r"re:.*mlp\.up_proj$"),
        "c": group("packed 8 bits", f"{layer}.up_proj"),
        "d": group("fp8 channel", "re:.*o_proj"),
    }
    ignore = ["lm_head", r"re:.*layers\.1\.mlp\.gate.*"]
    edit_settings(model, format="mixed-precision", config_groups=groups, ignore=ignore)
    assert_transformers_logits(model)


@pytest.mark.parametrize("name", ["gptq v1", "packed asymmetric", "fp8 channel"])
def test_a_quantised_head(name: str) -> None:
    model = quantised_model("llama", FORMATS[name], head=True, vocab_size=136, **SIZES)
    edit_settings(model, lm_head=True, ignore=[])
    assert_transformers_logits(model)


@pytest.mark.parametrize("file", ["quant_config.json", "quantize_config.json"])
def test_settings_beside_the_config(file: str) -> None:
    """As AutoGPTQ's early releases wrote them, without a quant_method."""
    model = quantised_model("llama", FORMATS["gptq act-order"], **SIZES)
    settings = model.config()["quantization_config"]
    for key in ("quant_method", "checkpoint_format"):
        del settings[key]
    model.edit_config(quantization_config=...)
    (model.path / file).write_text(json.dumps(settings))
    assert_transformers_logits(model)


def edit_settings(model: TinyModel, **changes: Any) -> None:
    settings = model.config()["quantization_config"]
    model.edit_config(quantization_config=settings | changes)


# -- what other tools leave behind -------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_that_the_model_has_not(value: float) -> None:
    """AutoGPTQ wrote one of zeros for every linear."""
    model = quantised_model("llama", gptq(32), **SIZES)
    file, name = model.path / "model.safetensors", "model.layers.1.mlp.down_proj.bias"
    save_file(load_file(file) | {name: torch.full((64,), value)}, file)
    if value == 0.0:
        assert_transformers_logits(model)
        return
    with pytest.raises(CheckpointError, match=f"{name} is not zero, but this architecture"):
        PagedDecoder(model.path)


def test_scales_of_activations_have_no_use() -> None:
    model = quantised_model("llama", FORMATS["fp8 channel"], **SIZES)
    file = model.path / "model.safetensors"
    prefix = "model.layers.1.self_attn"
    names = (f"{prefix}.q_proj.input_scale", f"{prefix}.k_scale", f"{prefix}.v_scale")
    save_file(load_file(file) | {name: torch.tensor([0.5]) for name in names}, file)
    assert_transformers_logits(model)


def test_int8_is_multiplied_by_the_values_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed on any CPU; only one with VNNI would be asked to multiply."""
    monkeypatch.setattr("engine.models.rank_weights.has_int8_kernel", lambda device, dtype: True)
    model = quantised_model("llama", FORMATS["llm.int8"], **SIZES)
    spec = load_spec(model.path)
    with Checkpoint(model.path) as checkpoint:
        shard = Shard.of(spec, 1, 2)
        weights = dict(RankWeights(checkpoint, spec, shard, torch.bfloat16, "cpu", True))
        down, qkv = weights["layers.0.down.weight"], weights["layers.0.qkv.weight"]
        scales = checkpoint.read("model.layers.0.mlp.down_proj.SCB") / 127
    assert isinstance(down, Int8Weight)
    assert isinstance(qkv, Int8Weight)
    assert torch.equal(down.scales, scales)
    assert down.shape == (64, 96)
    assert qkv.shape == (2 * 16 + 2 * 16, 64)


@pytest.mark.parametrize("tensor", ["model.norm.weight", "lm_head.weight"])
def test_dense_tensors_must_be_finite(tensor: str) -> None:
    model = quantised_model("llama", FORMATS["awq gemm"], **SIZES)
    file = model.path / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor].view(-1)[3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"the tensor {tensor} holds 1 values that are NaN"):
        PagedDecoder(model.path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq 3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "bits must be one of"),
    "gptq marlin": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
        "checkpoint_format must be one of gptq, gptq_v2, got 'marlin'",
    ),
    "gptq pattern": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:(": {}}},
        "must be a regular expression",
    ),
    "gptq dynamic bits": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {".*": {"bits": 3}}},
        "dynamic: .*: bits must be one of 2, 4, 8, got 3",
    ),
    "gptq modules": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "modules_in_block_to_quantize": "q"},
        "a list of lists of module names",
    ),
    "awq gemv group": (
        {"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 96},
        "32, 64 or a multiple of 128",
    ),
    "no groups": ({"quant_method": "compressed-tensors"}, "config_groups must be an object"),
    "packed 3 bits": (compressed_tensors("pack-quantized", {"num_bits": 3}), "num_bits must be"),
    "packed per tensor": (
        compressed_tensors("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
        "strategy must be one of group, channel",
    ),
    "marlin 24": (compressed_tensors("marlin-24", {"num_bits": 4}), "format must be one of"),
    "nvfp4": (
        compressed_tensors("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}),
        "format must be one of pack-quantized",
    ),
    "sparse": (
        {
            **compressed_tensors("pack-quantized", {"num_bits": 4}),
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
        "sparsity_config must be absent",
    ),
    "block": (
        {"quant_method": "fp8", "weight_block_size": [128]},
        "weight_block_size must be two numbers",
    ),
    "fp8 kind": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt must be one of e4m3"),
    "bnb neither": ({"quant_method": "bitsandbytes"}, "load_in_4bit must be true, or load_in_8bit"),
    "bnb storage": (
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_storage": "bfloat16",
        },
        "bnb_4bit_quant_storage must be one of uint8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused_by_name(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    copy_model(tiny_model("llama"), tmp_path).edit_config(quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config") as caught:
        load_spec(tmp_path)
    assert message in str(caught.value)
