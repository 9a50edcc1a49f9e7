"""silu(gate) * up in one kernel, over a tensor or the parts of a product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.dependent_launch import dependent_launch, launch_options
from kernels.gpu.partials import load_sum
from kernels.partials import Partials

BLOCK = 1024


@triton.jit(do_not_specialize=["M"])
def _silu_mul_kernel(
    x_ptr,  # [M, 2 * I], gate first, or float32 [SPLITS, M, 2 * I]
    bias_ptr,  # [2 * I], or None
    out_ptr,  # [M, I]
    M,
    size,
    SPLITS: tl.constexpr,  # 0: x is one tensor
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    offsets = row * 2 * size + columns
    stride = M * 2 * size
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = load_sum(x_ptr, offsets, columns, mask, stride, bias_ptr, SPLITS, DTYPE)
    up = load_sum(x_ptr, offsets + size, columns + size, mask, stride, bias_ptr, SPLITS, DTYPE)
    gate = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)  # rounded as torch rounds it
    tl.store(out_ptr + row * size + columns, (gate * up).to(DTYPE), mask=mask)


def silu_mul(gate_up: Tensor | Partials) -> Tensor:
    """gate_up [M, 2 * I], gate first -> [M, I]."""
    if isinstance(gate_up, Partials):
        data, bias, splits = gate_up.data, gate_up.bias, len(gate_up.data)
    else:
        data, bias, splits = gate_up, None, 0
    assert data.is_contiguous()
    m, size = data.shape[-2], data.shape[-1] // 2
    out = torch.empty(m, size, dtype=gate_up.dtype, device=data.device)
    pdl = dependent_launch(data.device)
    _silu_mul_kernel[(m, triton.cdiv(size, BLOCK))](
        data, bias, out, m, size, SPLITS=splits, BLOCK=BLOCK, PDL=pdl, **launch_options(pdl)
    )
    return out


def compile_cases() -> list[CompileCase]:
    bf16, f32 = torch.bfloat16, torch.float32
    forms = ((bf16, 0, False), (f32, 0, False), (bf16, 4, False), (bf16, 8, True))
    return [
        CompileCase(
            f"{str(dtype).removeprefix('torch.')} {splits} parts" + " bias" * bias,
            _silu_mul_kernel,
            (f32 if splits else dtype, dtype if bias else None, dtype, 16, 14336),
            {"SPLITS": splits, "BLOCK": BLOCK, "PDL": False},
        )
        for dtype, splits, bias in forms
    ]
