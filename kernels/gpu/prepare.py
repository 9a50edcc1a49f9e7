"""Batch preparation: one packed buffer and the persistent tables give the tensors of a GpuStep.

The buffer is int32: a header of num_tokens T, num_seqs S, num_logits L, num_changes C and two
numbers of the host's, then

    input_ids [T]  rows [S]  query_start_loc [S+1]  context_lens [S]  logit_indices [L]
    table_entries [C]  table_block_ids [C]

An input id of -1 is the token that the step before drew for that row: token_pool[row]. Token t of
sequence s is at position context_lens[s] - (query_start_loc[s+1] - t), and its slot is where the
block table of the row says. First the tables' changed entries are written, by a kernel of their
own because all programs of the next one may read them.

The kernels read the sizes from the buffer, so that a CUDA graph replays them for any step that
fits its bucket: what is beyond the step's tokens and sequences becomes padding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.step import GpuStep

HEADER = tl.constexpr(6)
_PENDING = tl.constexpr(-1)
# Changes are few (a block per sequence and 64 tokens) but for a step in which a long prefix is
# found: its tens of thousands of entries take some turns of so many programs.
_CHANGE_PROGRAMS = 8
_BLOCK = 256


@triton.jit
def _apply_changes_kernel(batch_ptr, tables_ptr, BLOCK: tl.constexpr):
    num_changes = tl.load(batch_ptr + 3)
    lists = HEADER + tl.load(batch_ptr) + 3 * tl.load(batch_ptr + 1) + 1 + tl.load(batch_ptr + 2)
    start = tl.program_id(0) * BLOCK
    while start < num_changes:
        offs = start + tl.arange(0, BLOCK)
        mask = offs < num_changes
        entries = tl.load(batch_ptr + lists + offs, mask=mask, other=0)
        block_ids = tl.load(batch_ptr + lists + num_changes + offs, mask=mask, other=0)
        tl.store(tables_ptr + entries, block_ids, mask=mask)
        start += tl.num_programs(0) * BLOCK


@triton.jit(do_not_specialize=["padded_tokens", "padded_seqs", "table_width"])
def _prepare_kernel(
    batch_ptr,
    token_pool_ptr,  # int32 [max_num_seqs]
    tables_ptr,  # int32 [max_num_seqs, table_width]
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    query_start_loc_ptr,
    context_lens_ptr,
    rows_ptr,
    padded_tokens,
    padded_seqs,
    table_width,
    BLOCK_SIZE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,  # 0: all are decode rows, so that token t is sequence t's
    BLOCK: tl.constexpr,
):
    num_tokens = tl.load(batch_ptr)
    num_seqs = tl.load(batch_ptr + 1)
    ids_src = batch_ptr + HEADER
    rows_src = ids_src + num_tokens
    starts_src = rows_src + num_seqs
    lens_src = starts_src + num_seqs + 1
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    is_seq = offs < num_seqs
    seq_rows = tl.load(rows_src + offs, mask=is_seq, other=0)
    seq_lens = tl.load(lens_src + offs, mask=is_seq, other=0)
    seq_starts = tl.load(starts_src + offs, mask=offs <= num_seqs, other=num_tokens)
    tl.store(rows_ptr + offs, seq_rows, mask=offs < padded_seqs)
    tl.store(context_lens_ptr + offs, seq_lens, mask=offs < padded_seqs)
    tl.store(query_start_loc_ptr + offs, seq_starts, mask=offs <= padded_seqs)

    is_token = offs < num_tokens
    if SEARCH_STEPS == 0:
        rows = seq_rows
        positions = seq_lens - 1
    else:
        low = tl.zeros((BLOCK,), tl.int32)
        high = tl.zeros((BLOCK,), tl.int32) + num_seqs - 1
        for _ in tl.static_range(SEARCH_STEPS):  # the last sequence that starts at or before it
            middle = (low + high + 1) // 2
            begins = tl.load(starts_src + middle, mask=is_token, other=0) <= offs
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle - 1)
        rows = tl.load(rows_src + low, mask=is_token, other=0)
        end = tl.load(starts_src + low + 1, mask=is_token, other=0)
        positions = tl.load(lens_src + low, mask=is_token, other=0) - (end - offs)
    positions = tl.where(is_token, positions, 0)
    ids = tl.load(ids_src + offs, mask=is_token, other=0)
    drawn = tl.load(token_pool_ptr + rows, mask=is_token & (ids == _PENDING), other=0)
    entries = rows.to(tl.int64) * table_width + positions // BLOCK_SIZE
    block_ids = tl.load(tables_ptr + entries, mask=is_token, other=0).to(tl.int64)
    slots = tl.where(is_token, block_ids * BLOCK_SIZE + positions % BLOCK_SIZE, -1)
    is_stored = offs < padded_tokens
    tl.store(input_ids_ptr + offs, tl.where(ids == _PENDING, drawn, ids), mask=is_stored)
    tl.store(positions_ptr + offs, positions, mask=is_stored)
    tl.store(slot_mapping_ptr + offs, slots, mask=is_stored)


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Memory for the step that is computed next; it stays where it is, as CUDA graphs want it."""

    batch: Tensor  # int32, the packed buffer
    input_ids: Tensor  # int32 [max tokens]
    positions: Tensor  # int32 [max tokens]
    slot_mapping: Tensor  # int64 [max tokens]
    query_start_loc: Tensor  # int32 [max seqs + 1]
    context_lens: Tensor  # int32 [max seqs]
    rows: Tensor  # int32 [max seqs]
    block_tables: Tensor  # int32 [max seqs, table width]
    token_pool: Tensor  # int32 [max seqs], the token drawn last for each row

    @classmethod
    def allocate(
        cls, max_num_tokens: int, max_num_seqs: int, table_width: int, buffer_size: int, device: str
    ) -> "StepTensors":
        """All zero: a batch without tokens, whose step is padding alone."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            batch=zeros(buffer_size),
            input_ids=zeros(max_num_tokens),
            positions=zeros(max_num_tokens),
            slot_mapping=zeros(max_num_tokens, dtype=torch.int64),
            query_start_loc=zeros(max_num_seqs + 1),
            context_lens=zeros(max_num_seqs),
            rows=zeros(max_num_seqs),
            block_tables=zeros(max_num_seqs, table_width),
            token_pool=zeros(max_num_seqs),
        )


def prepare(
    tensors: StepTensors,
    *,
    num_tokens: int,
    num_seqs: int,
    num_decodes: int,
    max_query_len: int,
    max_context_len: int,
    block_size: int,
) -> GpuStep:
    """The step in tensors.batch; the sizes may be larger than the batch's, the rest is padding."""
    assert num_tokens <= len(tensors.input_ids)
    assert num_seqs <= len(tensors.rows)
    assert num_decodes < num_seqs or num_tokens == num_seqs
    max_num_seqs, width = tensors.block_tables.shape
    _apply_changes_kernel[(_CHANGE_PROGRAMS,)](tensors.batch, tensors.block_tables, BLOCK=_BLOCK)
    _prepare_kernel[(triton.cdiv(max(num_tokens, num_seqs + 1), _BLOCK),)](
        tensors.batch,
        tensors.token_pool,
        tensors.block_tables,
        tensors.input_ids,
        tensors.positions,
        tensors.slot_mapping,
        tensors.query_start_loc,
        tensors.context_lens,
        tensors.rows,
        num_tokens,
        num_seqs,
        width,
        BLOCK_SIZE=block_size,
        SEARCH_STEPS=0 if num_decodes == num_seqs else max_num_seqs.bit_length(),
        BLOCK=_BLOCK,
    )
    return GpuStep(
        input_ids=tensors.input_ids[:num_tokens],
        positions=tensors.positions[:num_tokens],
        slot_mapping=tensors.slot_mapping[:num_tokens],
        query_start_loc=tensors.query_start_loc[: num_seqs + 1],
        context_lens=tensors.context_lens[:num_seqs],
        rows=tensors.rows[:num_seqs],
        block_tables=tensors.block_tables,
        num_decodes=num_decodes,
        max_query_len=max_query_len,
        max_context_len=max_context_len,
        block_size=block_size,
    )


def compile_cases() -> list[CompileCase]:
    i32, i64 = torch.int32, torch.int64
    arguments = (i32, i32, i32, i32, i32, i64, i32, i32, i32, 1, 1, 1)
    constants: dict[str, Any] = {"BLOCK_SIZE": 64, "BLOCK": _BLOCK}
    return [
        CompileCase("apply_changes", _apply_changes_kernel, (i32, i32), {"BLOCK": _BLOCK}),
        CompileCase("prepare decodes", _prepare_kernel, arguments, constants | {"SEARCH_STEPS": 0}),
        CompileCase(
            "prepare", _prepare_kernel, arguments, constants | {"SEARCH_STEPS": (256).bit_length()}
        ),
    ]
