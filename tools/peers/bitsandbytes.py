"""bitsandbytes through transformers. Methods: "nf4", "nf4-double" (nested scales) and "int8"."""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tools.peers.job import Job

PACKAGES = ("bitsandbytes", "transformers", "torch")


def quantize(job: Job) -> None:
    """There is nothing to calibrate: the samples are not read."""
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if job.method == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=job.method == "nf4-double",
            bnb_4bit_compute_dtype=getattr(torch, job.dtype),
        )
    )
    model = _load(job.model, dtype=getattr(torch, job.dtype), quantization_config=config)
    model.save_pretrained(job.out)


def dequantize(path: Path) -> dict[str, Tensor]:
    """By its own functions, in float32."""
    modules = _load(path, dtype=torch.float32).named_modules()
    return {
        name: _dense(module)
        for name, module in modules
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def _load(path: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **settings)


def _dense(module: Linear4bit | Linear8bitLt) -> Tensor:
    weight = module.weight
    if isinstance(module, Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        dense: Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
    else:
        weight.quant_state.dtype = torch.float32
        dense = functional.dequantize_4bit(weight.data, weight.quant_state)
    return dense.float()
