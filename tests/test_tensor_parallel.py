"""Two ranks (gloo, one thread each) compute what one rank computes."""

import socket
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from engine.errors import ConfigError
from engine.models import check_tp, load_spec
from tests.paged_decoding import PagedDecoder, Replay, replay_rank
from tests.test_families import NUM_TOKENS, PROMPT
from tests.tiny_models import tiny_model

EVEN = {"intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
CASES: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "llama with biases and an odd vocabulary": (
        "llama",
        None,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "awq": ("llama", 16, {**EVEN, "attention_bias": True}),
    "awq with a head that ends within a word": (
        "llama",
        16,
        {**EVEN, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12},
    ),
    "awq, ranks' inputs end within groups": (
        "llama",
        16,
        {**EVEN, "num_key_value_heads": 4, "head_dim": 12, "intermediate_size": 80},
    ),
    "tied": ("llama", None, {"tie_word_embeddings": True}),
    "one kv head": ("llama", None, {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", None, {}),
    "qwen3": ("qwen3", None, {}),
    "internlm2": ("internlm2", None, {}),
    "internlm2 awq, one kv head": ("internlm2", 16, {**EVEN, "num_key_value_heads": 1}),
    "quantised keys and values": ("llama", None, {"hidden_size": 64}),
}


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Per case the logits of one rank and of two; one spawn serves all cases."""
    out = tmp_path_factory.mktemp("tp") / "logits.pt"
    names, alone, jobs = [], [], []
    for name, (family, group_size, config) in CASES.items():
        path = tiny_model(family, group_size, **config).path
        for dtype in (torch.float32, torch.bfloat16)[: 2 if name == "awq" else 1]:
            policy = 4 if "quantised" in name else 0
            decoder = PagedDecoder(path, dtype, quant_policy=policy)
            output = decoder.greedy(PROMPT, NUM_TOKENS)
            jobs.append(Replay(path, dtype, PROMPT, output, quant_policy=policy))
            result = decoder.replay(PROMPT, jobs[-1].output)
            assert result is not None
            alone.append(result)
            names.append(name if dtype == torch.float32 else "bfloat16")
    spawn(replay_rank, (f"127.0.0.1:{free_port()}", out, jobs), nprocs=2)  # type: ignore[no-untyped-call]
    return dict(zip(names, zip(alone, torch.load(out), strict=True), strict=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, logits: dict[str, tuple[Tensor, Tensor]]) -> None:
    alone, shared = logits[case]
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)
    generated = slice(len(PROMPT) - 1, None)
    assert torch.equal(shared[generated].argmax(1), alone[generated].argmax(1))


def test_two_ranks_in_bfloat16(logits: dict[str, tuple[Tensor, Tensor]]) -> None:
    alone, shared = logits["bfloat16"]
    assert (alone - shared).norm() / alone.norm() < 0.1


@pytest.mark.parametrize(
    ("config", "tp", "message"),
    [
        ({}, 3, "its 4 attention heads are no multiple of 3; allowed: 1, 2, 4"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 6, "its 4 kv heads neither"),
        ({"intermediate_size": 90}, 4, "its intermediate_size 90 is no multiple of 4"),
    ],
)
def test_uneven_cut_is_refused(config: dict[str, Any], tp: int, message: str) -> None:
    spec = load_spec(tiny_model("llama", **config).path)
    with pytest.raises(ConfigError, match=f"tp={tp} does not fit") as caught:
        check_tp(spec, tp)
    assert message in str(caught.value)
    check_tp(spec, 1)
