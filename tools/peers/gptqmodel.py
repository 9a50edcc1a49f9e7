"""GPTQModel, which writes GPTQ (layouts "gptq" and "gptq_v2") and AWQ ("gemm").

Methods: "gptq" and "awq".
"""

import os
from pathlib import Path

# Two threads of a pool are always asked for, which fails where half of the cores is one.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import PackableQuantLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file
from torch import Tensor

from tools.peers.job import Job

BATCH_SIZE = 8  # samples that are computed at once
PACKAGES = ("gptqmodel", "transformers", "torch")


def quantize(job: Job) -> None:
    """With the tool's own defaults but for what the job says."""
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        desc_act=job.act_order,
        sym=job.symmetric,
        quant_method=job.method,
        format=job.layout,
        **({"act_group_aware": False} if job.group_size == -1 else {}),
    )
    model = GPTQModel.load(
        str(job.model), config, backend=BACKEND.TORCH, dtype=getattr(torch, job.dtype)
    )
    samples = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in job.ids()
    ]
    model.quantize(samples, batch_size=BATCH_SIZE)
    model.save(str(job.out))


@torch.inference_mode()
def dequantize(path: Path) -> dict[str, Tensor]:
    """By its kernels of plain torch, with the stored scales in float32: it loads them as bf16."""
    stored = load_file(path / "model.safetensors")
    loaded = GPTQModel.load(str(path), backend=BACKEND.TORCH, device="cpu")
    found = {}
    for name, module in loaded.model.named_modules():
        if isinstance(module, PackableQuantLinear | AwqTorchLinear):
            module.scales = stored[f"{name}.scales"].float()
            found[name] = _dense(module).t().float().contiguous()
    return found


def _dense(module: PackableQuantLinear | AwqTorchLinear) -> Tensor:
    """[K, N]."""
    if isinstance(module, AwqTorchLinear):
        words = module.qweight, module.qzeros
        dense: Tensor = dequantize_gemm(*words, module.scales, module.bits, module.group_size)
    else:  # the class's own: the module's is compiled, for bf16
        dense = PackableQuantLinear.dequantize_weight(module)
    return dense
