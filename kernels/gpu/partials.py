"""Adding up the parts of a product cut along K (kernels/partials.py), in order, so repeatably."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.dependent_launch import dependent_launch, launch_options
from kernels.partials import Partials

BLOCK = 1024


@triton.jit
def load_sum(
    x_ptr,  # [..., columns] of DTYPE; with SPLITS of them `stride` apart, float32
    offsets,
    columns,
    mask,
    stride,
    bias_ptr,  # [columns], or None
    SPLITS: tl.constexpr,  # 0: x is one tensor, whose bias is in it
    DTYPE: tl.constexpr,
):
    """Values of x, or of its parts' sum plus the bias, rounded to DTYPE, as float32."""
    total = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(x_ptr + split * stride + offsets, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return total.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _sum_partials_kernel(
    parts_ptr,  # float32 [SPLITS, M, N]
    bias_ptr,  # [N], or None
    out_ptr,  # [M, N]
    M,
    N,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    offsets = row * N + columns
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = load_sum(parts_ptr, offsets, columns, mask, M * N, bias_ptr, SPLITS, DTYPE)
    tl.store(out_ptr + offsets, total.to(DTYPE), mask=mask)


def sum_partials(partials: Partials) -> Tensor:
    """[M, N]."""
    splits, m, n = partials.data.shape
    assert partials.data.is_contiguous()
    out = torch.empty(m, n, dtype=partials.dtype, device=partials.data.device)
    pdl = dependent_launch(out.device)
    _sum_partials_kernel[(m, triton.cdiv(n, BLOCK))](
        partials.data, partials.bias, out, m, n, SPLITS=splits, BLOCK=BLOCK, PDL=pdl,
        **launch_options(pdl),
    )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    bf16, f32 = torch.bfloat16, torch.float32
    return [
        CompileCase(
            f"{splits} parts" + " bias" * (bias is not None),
            _sum_partials_kernel,
            (f32, bias, bf16, 16, 4096),
            {"SPLITS": splits, "BLOCK": BLOCK, "PDL": False},
        )
        for splits, bias in ((2, None), (4, bf16), (8, None))
    ]
