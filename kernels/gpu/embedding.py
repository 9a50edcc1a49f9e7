"""Embedding rows of token ids that only the device knows; kernels/embedding.py is the twin.

A copy: the rows move as 2- or 4-byte integers. With `first` the table is one rank's part of the
vocabulary, and the ids of others give zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase

_BLOCK = 1024


@triton.jit(do_not_specialize=["first", "num_rows"])
def _embed_kernel(
    ids_ptr,  # [T]
    table_ptr,  # [num_rows, H]
    out_ptr,  # [T, H]
    first,
    num_rows,
    H,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < H
    row = tl.load(ids_ptr + token) - first
    num_here = tl.where((row >= 0) & (row < num_rows), H, 0)
    values = tl.load(table_ptr + row.to(tl.int64) * H + offs, mask=offs < num_here, other=0)
    tl.store(out_ptr + token.to(tl.int64) * H + offs, values, mask=mask)


def embed(token_ids: Tensor, table: Tensor, first: int) -> Tensor:
    """token_ids [T], table [rows, H] of the ids from `first` on -> [T, H]."""
    assert table.is_contiguous()
    (num_tokens,), (num_rows, hidden_size) = token_ids.shape, table.shape
    out = table.new_empty((num_tokens, hidden_size))
    bits = torch.int16 if table.itemsize == 2 else torch.int32
    _embed_kernel[(num_tokens, triton.cdiv(hidden_size, _BLOCK))](
        token_ids,
        table.view(bits),
        out.view(bits),
        first,
        num_rows,
        hidden_size,
        BLOCK=_BLOCK,
    )
    return out


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            f"embed {bits}".replace("torch.", ""),
            _embed_kernel,
            (torch.int32, bits, bits, 1, 1, 16),
            {"BLOCK": _BLOCK},
        )
        for bits in (torch.int16, torch.int32)
    ]
