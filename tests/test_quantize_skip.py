"""Linears that a method is told to skip stay as they are, and nothing that would change them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.quantize.awq import Awq
from engine.quantize.gptq import Gptq
from engine.quantize.int8 import Int8
from engine.quantize.layer import ROLES
from engine.quantize.prune import Prune
from engine.quantize.rtn import Rtn
from engine.quantize.smooth_quant import SmoothQuant
from tests.quantize_cases import tiny_layer

METHODS: dict[str, Any] = {
    "rtn": lambda skip: Rtn(group_size=8, skip=skip),
    "awq": lambda skip: Awq(group_size=8, skip=skip),
    "gptq": lambda skip: Gptq(group_size=8, skip=skip),
    "int8": lambda skip: Int8(skip=skip),
    "smooth_quant": lambda skip: SmoothQuant(skip=skip),
    "prune": lambda skip: Prune(skip=skip),
}


@pytest.mark.parametrize(
    ("family", "skip", "kept"),
    [
        ("qwen2", ("v_proj", "down_proj"), {"v", "down"}),
        ("llama", ("self_attn",), {"q", "k", "v", "o"}),
        ("internlm2", ("wqkv", "w1"), {"q", "k", "v", "gate"}),
        ("llama", ("layers.0.",), set(ROLES)),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_skipped_stays_bit_by_bit(
    name: str, family: str, skip: tuple[str, ...], kept: set[str]
) -> None:
    case, exact = tiny_layer(family), tiny_layer(family).layer
    result = METHODS[name](skip).quantize_layer(case.layer, case.calibration)
    assert set(result.linears) == set(ROLES)
    assert set(result.errors) == set(ROLES) - kept
    for role, matrix in result.linears.items():
        if role in kept:
            assert isinstance(matrix, Tensor)
            assert torch.equal(matrix, exact.weights[role])
        else:
            assert not torch.equal(case.layer.weights[role], exact.weights[role])
    torch.testing.assert_close(
        case.calibration.hidden, case.layer.forward(case.hidden), rtol=1e-4, atol=1e-4
    )
