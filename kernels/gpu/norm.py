"""Residual addition and RMSNorm in one kernel, over a tensor or the parts of a product.

    total  = x + residual                    x: the sum of the parts and the bias, where it has any
    normed = total / rms(total) * weight     rms(t) = sqrt(mean(t^2) + eps)

A program has one row. Means and quotients are float32; x, total and the quotient are rounded to
the row's dtype where kernels/norm.py rounds them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.dependent_launch import dependent_launch, launch_options
from kernels.gpu.partials import load_sum
from kernels.partials import Partials


@triton.jit(do_not_specialize=["M"])
def _add_rms_norm_kernel(
    x_ptr,  # [M, H], or float32 [SPLITS, M, H]
    bias_ptr,  # [H], or None
    residual_ptr,  # [M, H], or None
    weight_ptr,  # [H]
    total_ptr,  # [M, H], or None where x is the total
    normed_ptr,  # [M, H]
    M,
    H,
    eps,
    SPLITS: tl.constexpr,  # 0: x is one tensor
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    DTYPE: tl.constexpr = normed_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_H)
    mask = columns < H
    offsets = tl.program_id(0).to(tl.int64) * H + columns
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = load_sum(x_ptr, offsets, columns, mask, M * H, bias_ptr, SPLITS, DTYPE)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total = total.to(DTYPE).to(tl.float32)
    if total_ptr is not None:
        tl.store(total_ptr + offsets, total.to(DTYPE), mask=mask)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / H + eps)
    normed = (total * scale).to(DTYPE).to(tl.float32) * weight
    tl.store(normed_ptr + offsets, normed.to(DTYPE), mask=mask)


def add_rms_norm(
    x: Tensor | Partials, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(normed, total), both [M, H]."""
    data, bias, splits = (x.data, x.bias, len(x.data)) if isinstance(x, Partials) else (x, None, 0)
    m, h = data.shape[-2:]
    assert data.is_contiguous()
    assert weight.shape == (h,)
    normed = torch.empty(m, h, dtype=weight.dtype, device=weight.device)
    total = None if x is data and residual is None else torch.empty_like(normed)
    if residual is not None:
        assert residual.is_contiguous()
        assert residual.shape == (m, h)
    pdl = dependent_launch(weight.device)
    _add_rms_norm_kernel[(m,)](
        data, bias, residual, weight, total, normed, m, h, eps,
        SPLITS=splits, BLOCK_H=triton.next_power_of_2(h), PDL=pdl, num_warps=_num_warps(h),
        **launch_options(pdl),
    )  # fmt: skip
    return normed, data if total is None else total


def _num_warps(h: int) -> int:
    """Threads with 16 values of the row each: two loads of 16 bytes of every operand."""
    return 4 if h <= 2048 else 8 if h <= 4096 else 16


def compile_cases() -> list[CompileCase]:
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    forms = (
        ("first", bf16, 0, False, False, 4096, False),
        ("plain", bf16, 0, False, True, 4096, False),
        ("plain fp32", f32, 0, False, True, 4096, False),
        ("wide", bf16, 0, False, True, 8192, False),
        ("odd", f16, 0, False, True, 2560, False),
        ("2 parts", bf16, 2, False, True, 4096, False),
        ("4 parts", bf16, 4, False, True, 4096, False),
        ("4 parts bias", bf16, 4, True, True, 4096, False),
        ("8 parts wide", bf16, 8, False, True, 8192, False),
        ("4 parts pdl", bf16, 4, False, True, 4096, True),
    )
    return [
        CompileCase(
            f"{name} {h}",
            _add_rms_norm_kernel,
            (
                f32 if splits else dtype,
                dtype if bias else None,
                dtype if residual else None,
                dtype,
                dtype if residual else None,
                dtype,
                16,
                h,
                1e-5,
            ),
            {"SPLITS": splits, "BLOCK_H": triton.next_power_of_2(h), "PDL": pdl},
            {"num_warps": _num_warps(h)} | launch_options(pdl),
            min_capability=90 if pdl else 80,
        )
        for name, dtype, splits, bias, residual, h, pdl in forms
    ]
