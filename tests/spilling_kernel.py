"""A matrix product for tests of the compile report, with registers enough and with too few."""

import torch
import triton
import triton.language as tl

from kernels.gpu.compile import CompileCase


@triton.jit(do_not_specialize=["K"])  # type: ignore[untyped-decorator]
def _product_kernel(x_ptr, w_ptr, y_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    offs = tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + offs[:, None] * 4096 + (k + offs_k)[None, :])
        w = tl.load(w_ptr + offs[:, None] * 4096 + (k + offs_k)[None, :])
        acc += tl.dot(x, w.T)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc.to(tl.bfloat16))


def case(block: int, **options: int) -> CompileCase:
    return CompileCase(
        f"product {block}",
        _product_kernel,
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, 4096),
        {"BLOCK": block, "BLOCK_K": 64},
        {"num_warps": 4, "num_stages": 3} | options,
        elements=block * 64,
    )
