"""AutoAWQ, which writes AWQ in the layouts "gemm" and "gemv". Method: "awq".

Its clip search wants outputs in multiples of 64. It reads "gemv" only on a GPU, so what that
stands for is noted when it is packed: in fp16, as the tool computes it.
"""

from functools import wraps
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear import WQLinear_GEMV
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.peers.job import Job

PACKAGES = ("autoawq", "transformers", "torch")


def quantize(job: Job) -> None:
    """With the tool's own defaults but for what the job says."""
    model = AutoAWQForCausalLM.from_pretrained(
        str(job.model), torch_dtype=getattr(torch, job.dtype), device_map="cpu", safetensors=True
    )
    ids = job.ids()
    _keep_weights(WQLinear_GEMV)
    model.quantize(
        None,
        quant_config={
            "zero_point": not job.symmetric,
            "q_group_size": job.group_size,
            "w_bit": job.bits,
            "version": job.layout,
        },
        calib_data=ids.tolist(),
        max_calib_samples=ids.shape[0],
        max_calib_seq_len=ids.shape[1],
    )
    model.save_quantized(str(job.out))
    kept = {
        name: module.kept
        for name, module in model.model.named_modules()
        if isinstance(module, WQLinear_GEMV)
    }
    if kept:
        save_file(kept, _kept_file(job.out))


def dequantize(path: Path) -> dict[str, Tensor]:
    """By its own unpacking, with scales in float32; "gemv": as noted when it was packed."""
    if _kept_file(path).exists():
        return {name: weight.float() for name, weight in load_file(_kept_file(path)).items()}
    stored = load_file(path / "model.safetensors")
    found = {}
    for name in stored:
        module = name.removesuffix(".qweight")
        if module != name:
            scales = stored[f"{module}.scales"].float()
            group_size = stored[name].shape[0] // scales.shape[0]
            dense = dequantize_gemm(stored[name], stored[f"{module}.qzeros"], scales, 4, group_size)
            found[module] = dense.t().contiguous()
    return found


def _keep_weights(linear_class: type[WQLinear_GEMV]) -> None:
    """Have the class remember what its linears packed: they get dequantised weights."""
    from_linear = linear_class.from_linear

    @wraps(from_linear)
    def keeping(linear: torch.nn.Linear, *args: object, **kwargs: object) -> torch.nn.Module:
        packed: torch.nn.Module = from_linear(linear, *args, **kwargs)
        packed.kept = linear.weight.detach().clone()
        return packed

    linear_class.from_linear = keeping


def _kept_file(path: Path) -> Path:
    return path / "gemv_weights.safetensors"
