"""Sampling: one token per row of logits, without a sort, a random state or a wait for the host.

Two launches. `_scan_kernel`, a program per row and block of the vocabulary: the greatest logit of
the block and the winner of its Gumbel race, argmax((x - block maximum) / T + g); greedy rows run
without noise. `_finish_kernel`, a program per row: the block winners are compared at the row's
maximum, the token is stored where the next step finds it, and the row's record advances.

Rows with top_k, top_p or min_p have no race in the first launch. It leaves the blocks' weights and
the maxima of groups of 128 tokens instead; they give a floor below which nothing can stay: the
k-th greatest group maximum, or the logit whose V-fold weight is less than 1 - p of the row's. The
second launch gathers what lies at or above the floor (mostly hundreds of tokens), finds the cuts
there and draws (kernels/gpu/sampling_limits.py); where too much remains it does so on the row.

Every row is computed by programs of its own in a fixed order: its token depends on its logits,
record and tail only. Of equal values the lower id wins.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.gumbel import gumbel_of_block
from kernels.gpu.sampling_limits import draw_limited, is_limited, load_logits
from kernels.gpu.sampling_table import (
    NUM_OUTPUTS_WORD,
    NUM_PROMPT_WORD,
    SCALE_WORD,
    SEED_WORD,
    TAIL,
    TAIL_WORD,
    load_float,
    load_word64,
    request_of,
)

BLOCK = 2048  # one row of 128k tokens fills 63 SMs; 16 tokens per thread of 4 warps
GROUP = 128
TILE = 4096  # of one program that goes through a row: 8 tokens per thread of 16 warps
CAPACITY = 16384  # tokens at or above the floor that are gathered; 8 bytes each per row
# Bits of a float32 that the type leaves zero.
_ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def _scan_kernel(
    logits_ptr,  # [S, VOCAB]
    rows_ptr,  # int32 [S] of the table
    table_ptr,  # int32 [max_num_seqs, WORDS]
    maxima_ptr,  # float32 [S, blocks]
    scores_ptr,  # float32 [S, blocks] of the winner, relative to the block's maximum
    winners_ptr,  # int32 [S, blocks]
    weights_ptr,  # float32 [S, blocks] relative to the block's maximum, of rows with limits
    group_maxima_ptr,  # float32 [S, blocks * BLOCK / GROUP], of rows with limits
    stride_logits,
    VOCAB: tl.constexpr,
    LIMITS: tl.constexpr,  # whether any row has top_k, top_p or min_p
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    index, block = tl.program_id(0), tl.program_id(1)
    first = block * BLOCK
    offs = first + tl.arange(0, BLOCK)
    x = load_logits(logits_ptr + index.to(tl.int64) * stride_logits, offs, VOCAB)
    x = tl.where(x == x, x, float("inf"))  # NaN: the row's maximum shall tell
    maximum = tl.max(x, 0)
    request = request_of(table_ptr, rows_ptr, index)
    scale = load_float(request + SCALE_WORD)
    scaled = (x - tl.where(maximum == -float("inf"), 0.0, maximum)) * tl.where(
        scale > 0, scale, 1.0
    )
    place = index * tl.num_programs(1) + block
    races = scale > 0
    limited = is_limited(request, VOCAB) if LIMITS else False
    if limited:
        races = False
        tl.store(weights_ptr + place, tl.sum(tl.exp(scaled), 0))
        groups = place * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        tl.store(group_maxima_ptr + groups, tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), 1))
    if races:
        seed = load_word64(request + SEED_WORD)
        scaled += gumbel_of_block(seed, tl.load(request + NUM_OUTPUTS_WORD), first, BLOCK)
    score, winner = tl.max(scaled, 0, return_indices=True)
    tl.store(maxima_ptr + place, maximum)
    tl.store(scores_ptr + place, score)
    tl.store(winners_ptr + place, tl.minimum(first + winner, VOCAB - 1))  # NaN may point beyond


@triton.jit(do_not_specialize=["num_rows"])
def _finish_kernel(
    logits_ptr,  # [S, VOCAB]
    rows_ptr,  # int32 [S]
    table_ptr,  # int32 [max_num_seqs, WORDS]
    counts_ptr,  # int16 [max_num_seqs, VOCAB], None when nobody counts
    maxima_ptr,  # float32 [S, NUM_BLOCKS], as the next four: what _scan_kernel wrote
    scores_ptr,
    winners_ptr,
    weights_ptr,
    group_maxima_ptr,
    values_ptr,  # float32 [S, CAPACITY] scratch
    ids_ptr,  # int32 [S, CAPACITY] scratch
    token_pool_ptr,  # int32 [max_num_seqs]
    out_ptr,  # int32 [2, num_rows] token ids, then 1 where they are usable
    stride_logits,
    num_rows,
    VOCAB: tl.constexpr,
    LIMITS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0)
    request = request_of(table_ptr, rows_ptr, index)
    scale = load_float(request + SCALE_WORD)
    factor = tl.where(scale > 0, scale, 1.0)
    offs = tl.arange(0, PADDED_BLOCKS)
    inside = offs < NUM_BLOCKS
    blocks = index * NUM_BLOCKS + offs
    maxima = tl.load(maxima_ptr + blocks, mask=inside, other=-float("inf"))
    maximum = tl.max(maxima, 0)
    valid = (maximum > -float("inf")) & (maximum < float("inf"))
    scores = (maxima - maximum) * factor + tl.load(scores_ptr + blocks, mask=inside, other=0.0)
    scores = tl.where(scores == scores, scores, -float("inf"))
    _, block = tl.max(scores, 0, return_indices=True)
    token_id = tl.load(winners_ptr + index * NUM_BLOCKS + block)
    limited = valid & is_limited(request, VOCAB) if LIMITS else False
    if limited:
        weights = tl.load(weights_ptr + blocks, mask=inside, other=0.0)
        token_id = draw_limited(
            logits_ptr + index.to(tl.int64) * stride_logits,
            request,
            values_ptr + index * CAPACITY,
            ids_ptr + index * CAPACITY,
            group_maxima_ptr + index * NUM_GROUPS,
            maximum,
            tl.sum(weights * tl.exp((maxima - maximum) * scale), 0),
            VOCAB,
            NUM_GROUPS,
            PADDED_GROUPS,
            CAPACITY,
            SHIFT,
            TILE,
        )
    row = tl.load(rows_ptr + index)
    num_outputs = tl.load(request + NUM_OUTPUTS_WORD)
    num_tokens = tl.load(request + NUM_PROMPT_WORD) + num_outputs
    tl.store(request + TAIL_WORD + num_tokens % TAIL, token_id)
    tl.store(request + NUM_OUTPUTS_WORD, num_outputs + 1)
    if counts_ptr is not None:
        count_ptr = counts_ptr + row.to(tl.int64) * VOCAB + token_id
        count = tl.load(count_ptr)
        tl.store(count_ptr, tl.where((count & 0x7FFF) < 0x7FFF, count + 1, count))
    tl.store(token_pool_ptr + row, token_id)
    tl.store(out_ptr + index, token_id)
    tl.store(out_ptr + num_rows + index, valid.to(tl.int32))


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the two launches pass to each other, for up to max_num_seqs rows."""

    per_block: Tensor  # float32 [3, max_num_seqs, blocks]
    winners: Tensor  # int32 [max_num_seqs, blocks]
    group_maxima: Tensor  # float32 [max_num_seqs, groups]
    values: Tensor  # float32 [max_num_seqs, CAPACITY]
    ids: Tensor  # int32 [max_num_seqs, CAPACITY]

    @classmethod
    def allocate(cls, vocab_size: int, max_num_seqs: int, device: torch.device) -> "Scratch":
        blocks = triton.cdiv(vocab_size, BLOCK)
        groups = blocks * (BLOCK // GROUP)

        def empty(kind: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        return cls(
            empty(torch.float32, 3, max_num_seqs, blocks),
            empty(torch.int32, max_num_seqs, blocks),
            empty(torch.float32, max_num_seqs, groups),
            empty(torch.float32, max_num_seqs, CAPACITY),
            empty(torch.int32, max_num_seqs, CAPACITY),
        )


def sample(
    logits: Tensor,
    rows: Tensor,
    table: Tensor,
    counts: Tensor | None,
    scratch: Scratch,
    token_pool: Tensor,
    out: Tensor,
    limits: bool,
) -> None:
    """Tokens of S rows into token_pool[rows] and out[0]; 1 into out[1] where they are usable.

    logits [S or more, V]; rows int32 [S]; counts int16 [max_num_seqs, V] of chosen tokens, to be
    advanced; out int32 [2, S]; limits: whether any row has top_k, top_p or min_p.
    """
    num_rows, vocab_size = len(rows), logits.shape[1]
    assert logits.stride(1) == 1, logits.stride()
    assert len(logits) >= num_rows, logits.shape
    assert out.shape == (2, num_rows), out.shape
    assert out.is_contiguous()
    assert rows.dtype == token_pool.dtype == table.dtype == out.dtype == torch.int32
    maxima, scores, weights = scratch.per_block
    stages = (maxima, scores, scratch.winners, weights, scratch.group_maxima)
    scan_constants, finish_constants = _constants(vocab_size, limits, logits.dtype)
    _scan_kernel[(num_rows, finish_constants["NUM_BLOCKS"])](
        logits, rows, table, *stages, logits.stride(0), **scan_constants, num_warps=4
    )
    _finish_kernel[(num_rows,)](
        logits,
        rows,
        table,
        counts,
        *stages,
        scratch.values,
        scratch.ids,
        token_pool,
        out,
        logits.stride(0),
        num_rows,
        **finish_constants,
        num_warps=16 if limits else 1,
    )


def _constants(
    vocab_size: int, limits: bool, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Each step asks: triton.cdiv and next_power_of_2 would take microseconds."""
    num_blocks = -(-vocab_size // BLOCK)
    num_groups = num_blocks * (BLOCK // GROUP)
    both = {"VOCAB": vocab_size, "LIMITS": limits}
    scan = both | {"BLOCK": BLOCK, "GROUP": GROUP}
    finish = both | {
        "NUM_BLOCKS": num_blocks,
        "PADDED_BLOCKS": 1 << (num_blocks - 1).bit_length(),
        "NUM_GROUPS": num_groups,
        "PADDED_GROUPS": 1 << (num_groups - 1).bit_length(),
        "CAPACITY": CAPACITY,
        "SHIFT": _ZERO_BITS[dtype],
        "TILE": TILE,
    }
    return scan, finish


def compile_cases() -> list[CompileCase]:
    floats, integers, vocab_size = torch.float32, torch.int32, 128_256
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for limits in (False, True):
            name = f"{str(dtype).removeprefix('torch.')}{'_limits' if limits else ''}"
            scan, finish = _constants(vocab_size, limits, dtype)
            stages = (floats, floats, integers, floats, floats)
            rows = (dtype, integers, integers)
            cases.append(
                CompileCase(
                    f"sampling_scan_{name}",
                    _scan_kernel,
                    (*rows, *stages, vocab_size),
                    dict(scan),
                    {"num_warps": 4},
                )
            )
            # Who counts has penalties, hence logits edited in float32.
            for counts in (None, torch.int16) if dtype == torch.float32 else (None,):
                ends = (floats, integers, integers, integers, vocab_size, 5)
                cases.append(
                    CompileCase(
                        f"sampling_finish_{name}{'_counts' if counts else ''}",
                        _finish_kernel,
                        (*rows, counts, *stages, *ends),
                        dict(finish),
                        {"num_warps": 16 if limits else 1},
                    )
                )
    return cases
