"""Every family and option gives transformers' logits and greedy tokens, in float32 on the CPU."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError, ConfigError
from engine.models import load_spec, resolve_dtype
from tests.paged_decoding import PagedDecoder
from tests.tiny_models import FAMILIES, TinyModel, copy_model, tiny_model, write_servable_model

PROMPT = [int(t) for t in np.random.default_rng(1).integers(3, 131, size=40)]
NUM_TOKENS = 24

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,  # kept, blended and stretched dimensions
        "rope_theta": 100.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
        "rope_theta": 1000.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "no grouping": ("llama", {"num_key_value_heads": 4}),
    "head 40": ("llama", {"head_dim": 40, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "head 80": ("mistral", {"head_dim": 80}),
    "mistral window": ("mistral", {"sliding_window": 7}),
    "mistral no window": ("mistral", {"sliding_window": None}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2 layer types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3 head 24": ("qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen3 windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "internlm2 bias": ("internlm2", {"attention_bias": True, "num_key_value_heads": 2}),
    "internlm2 dynamic": ("internlm2", {"rope_parameters": dict(ROPES["dynamic"])}),
    "internlm2 groups of 3": (
        "internlm2",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    ),
    **{f"rope {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
}


def reference_logits(model: TinyModel, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model.reference(torch.tensor([token_ids])).logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits


def reference_greedy(model: TinyModel, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = model.reference.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False
    )
    return [int(token) for token in tokens[0, len(prompt) :]]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_transformers(case: str) -> None:
    family, config = CASES[case]
    model = tiny_model(family, **config)
    ours = PagedDecoder(model.path)
    torch.testing.assert_close(
        ours.logits(PROMPT), reference_logits(model, PROMPT), rtol=1e-4, atol=1e-4
    )
    expected = reference_greedy(model, PROMPT, NUM_TOKENS)
    assert ours.greedy(PROMPT, NUM_TOKENS) == expected
    assert len(set(expected)) > 3, "the oracle must not be a trivial loop"


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunked_prefill_equals_one_prefill(family: str, chunk: int) -> None:
    model = tiny_model(family, **({"sliding_window": 7} if family == "mistral" else {}))
    ours = PagedDecoder(model.path)
    torch.testing.assert_close(
        ours.logits(PROMPT, chunk), ours.logits(PROMPT), rtol=1e-4, atol=1e-4
    )


def test_decode_rows_and_prefill_chunks_share_a_step() -> None:
    model = tiny_model("qwen2")
    alone, mixed = PagedDecoder(model.path), PagedDecoder(model.path)
    first, second = mixed.add(30), mixed.add(30)
    mixed.step([(first, PROMPT[:10])])
    decoded, chunk = mixed.step([(first, PROMPT[10:11]), (second, PROMPT[20:37])])
    assert decoded is not None
    assert chunk is not None
    torch.testing.assert_close(decoded, alone.logits(PROMPT[:11])[-1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chunk, alone.logits(PROMPT[20:37]), rtol=1e-4, atol=1e-4)


def test_dynamic_ntk_beyond_the_trained_length_uses_the_base_of_session_len() -> None:
    """transformers scales its base by the longest sequence seen; ours is that of session_len."""
    model = tiny_model("llama", rope_parameters=ROPES["dynamic"], max_position_embeddings=32)
    long_prompt = PROMPT + PROMPT[:24]
    ours = PagedDecoder(model.path, session_len=len(long_prompt))
    expected = reference_logits(model, long_prompt)
    torch.testing.assert_close(ours.logits(long_prompt), expected, rtol=1e-4, atol=1e-4)
    # transformers keeps the longest base while sequences stay beyond the trained length.
    assert ours.greedy(PROMPT, 20) == reference_greedy(model, PROMPT, 20)


@pytest.mark.parametrize("name", [name for name in ROPES if name != "default"])
def test_both_spellings_of_rope_settings_read_the_same(name: str, tmp_path: Path) -> None:
    model = copy_model(tiny_model("llama", rope_parameters=ROPES[name]), tmp_path)
    settings = dict(ROPES[name])
    theta = settings.pop("rope_theta", 10_000.0)
    model.edit_config(
        rope_parameters=..., rope_scaling={"type": settings.pop("rope_type"), **settings}
    )
    model.edit_config(rope_theta=theta)
    assert load_spec(tmp_path) == load_spec(tiny_model("llama", rope_parameters=ROPES[name]).path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_windows_without_layer_types(family: str, first: int, tmp_path: Path) -> None:
    """Configs from before `layer_types` say from which layer on the window holds."""
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": first}
    model = copy_model(tiny_model(family, **window), tmp_path)
    expected = load_spec(tmp_path).windows
    model.edit_config(layer_types=...)
    assert load_spec(tmp_path).windows == expected == (None,) * first + (9,) * (2 - first)
    model.edit_config(use_sliding_window=False)
    assert load_spec(tmp_path).windows == (None, None)


def test_yarn_takes_its_factor_from_the_lengths_when_it_is_null() -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    model = tiny_model("llama", rope_parameters=rope)
    torch.testing.assert_close(
        PagedDecoder(model.path).logits(PROMPT),
        reference_logits(model, PROMPT),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("family", ["llama", "internlm2"])
@pytest.mark.parametrize("group_size", [16, 48])
def test_awq_equals_the_dequantised_model(family: str, group_size: int) -> None:
    model = tiny_model(family, group_size, intermediate_size=96, head_dim=12, attention_bias=True)
    ours = PagedDecoder(model.path)
    torch.testing.assert_close(
        ours.logits(PROMPT), reference_logits(model, PROMPT), rtol=1e-4, atol=1e-4
    )
    assert ours.greedy(PROMPT, NUM_TOKENS) == reference_greedy(model, PROMPT, NUM_TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_to_float32(family: str) -> None:
    model = tiny_model(family)
    exact, ours = reference_logits(model, PROMPT), PagedDecoder(model.path, torch.bfloat16)
    error = (ours.logits(PROMPT) - exact).norm() / exact.norm()
    assert error < 0.1


def test_checkpoint_written_in_parts_and_dtypes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    deepcopy(model.reference).half().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    expected = reference_logits(model, PROMPT)
    ours = PagedDecoder(tmp_path).logits(PROMPT)
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


REFUSED_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": ("llama", {"architectures": ["MixtralForCausalLM"]}, "LlamaForCausalLM"),
    "remote code": (
        "llama",
        {"architectures": ["XForCausalLM"], "auto_map": {"AutoModel": "x.X"}},
        "own code is never run",
    ),
    "no architecture": ("llama", {"architectures": ...}, "architectures must be a list"),
    "unnamed architecture": ("llama", {"architectures": [[]]}, "architectures must be a list"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act must be one of silu, got 'gelu'"),
    "rope type": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        "rope_type must be one of default, linear, dynamic, llama3, yarn, got 'longrope'",
    ),
    "rope per layer type": (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "one RoPE for all layers",
    ),
    "rope factor": ("llama", {"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "must be 1.0"),
    "no size": ("llama", {"hidden_size": ...}, "'hidden_size' is missing"),
    "bad size": ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers must be an integer"),
    "bad flag": ("llama", {"attention_bias": 1}, "attention_bias must be true or false"),
    "bad number": ("llama", {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
    "bad object": ("llama", {"rope_scaling": "yarn"}, "rope_scaling must be an object"),
    "dtype": ("llama", {"dtype": "float64"}, "dtype must be one of bfloat16, float16, float32"),
    "odd head": ("llama", {"head_dim": 13}, "head_dim must be even"),
    "kv heads": ("llama", {"num_key_value_heads": 3}, "must be a multiple of"),
    "layer types length": ("qwen2", {"layer_types": ["full_attention"]}, "a list of 2 entries"),
    "layer types value": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types must be full_attention",
    ),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_config_is_refused_by_name(case: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED_CONFIGS[case]
    copy_model(tiny_model(family), tmp_path).edit_config(**changes)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_spec(tmp_path)
    assert message in str(caught.value)


def test_config_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        load_spec(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        load_spec(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_spec(tmp_path)


def test_auto_map_of_a_known_architecture_loads_natively() -> None:
    model = tiny_model("internlm2")
    assert "auto_map" in model.config()
    assert load_spec(model.path).architecture == "InternLM2ForCausalLM"


def test_dtype_auto_is_the_checkpoints(tmp_path: Path) -> None:
    model = copy_model(tiny_model("llama"), tmp_path)
    for stored, device, expected in (
        ("float32", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float16", "cpu", torch.bfloat16),
        ("float16", "cuda", torch.float16),
    ):
        model.edit_config(dtype=..., torch_dtype=stored)
        assert resolve_dtype("auto", load_spec(tmp_path), device) == expected
    assert resolve_dtype("float32", load_spec(tmp_path), "cpu") == torch.float32
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        resolve_dtype("float16", load_spec(tmp_path), "cpu")


def test_servable_model_has_tokenizer_and_template(tmp_path: Path) -> None:
    write_servable_model("llama", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = tmp_path / "chat_template.jinja"
    assert template.exists() or "chat_template" in settings
    assert load_spec(tmp_path).vocab_size <= 300
