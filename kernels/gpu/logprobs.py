"""Log probabilities of given tokens, their ranks, and the most likely tokens with theirs.

log_softmax of the raw logits. `_block_kernel`, a program per row and block of the vocabulary: the
block's maximum, its weight, how many logits exceed the token's, and its num_top greatest, one
maximum after the other. `_merge_kernel`, a program per row, does the same to what the blocks found.

Logits are compared as the integers that order floats, so that one that is -inf is still greater
than one that was taken. Of equal logits the lower id comes first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.sampling_limits import load_logits, unit_of, value_of

BLOCK = 2048  # as kernels/gpu/sampling.py
MAX_TOP = 32  # places for the most likely of a block; at most 20 can be asked for
TAKEN = tl.constexpr(-(2**31))  # less than the integer of any float


@triton.jit(do_not_specialize=["num_top"])
def _block_kernel(
    logits_ptr,  # [S, VOCAB]
    rows_ptr,  # int32 [A] of the logits, None: row after row
    token_ids_ptr,  # int32 [S], or [A] when rows_ptr is None
    maxima_ptr,  # float32 [A, blocks]
    weights_ptr,  # float32 [A, blocks] relative to the block's maximum
    above_ptr,  # int32 [A, blocks]
    top_keys_ptr,  # int32 [A, blocks, MAX_TOP]
    top_ids_ptr,  # int32 [A, blocks, MAX_TOP]
    stride_logits,
    num_top,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_TOP: tl.constexpr,
):
    entry, block = tl.program_id(0), tl.program_id(1)
    index = entry
    if rows_ptr is not None:
        index = tl.load(rows_ptr + entry)
    first = block * BLOCK
    offs = first + tl.arange(0, BLOCK)
    logits_ptr += index.to(tl.int64) * stride_logits
    x = load_logits(logits_ptr, offs, VOCAB)
    chosen = tl.load(logits_ptr + tl.load(token_ids_ptr + index)).to(tl.float32)
    maximum = tl.max(x, 0)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    place = entry * tl.num_programs(1) + block
    tl.store(maxima_ptr + place, maximum)
    tl.store(weights_ptr + place, tl.sum(tl.exp(x - shift), 0))
    tl.store(above_ptr + place, tl.sum((x > chosen).to(tl.int32), 0))
    keys = tl.where(offs < VOCAB, unit_of(x + 0.0, 0), TAKEN)  # -0.0 + 0.0 is 0.0
    place = place.to(tl.int64) * MAX_TOP
    for rank in range(num_top):
        key, winner = tl.max(keys, 0, return_indices=True)
        tl.store(top_keys_ptr + place + rank, key)
        tl.store(top_ids_ptr + place + rank, first + winner)
        keys = tl.where(offs == first + winner, TAKEN, keys)


@triton.jit(do_not_specialize=["num_top", "stride_out"])
def _merge_kernel(
    logits_ptr,  # [S, VOCAB]
    rows_ptr,  # int32 [A], None: row after row
    token_ids_ptr,  # int32 [S], or [A] when rows_ptr is None
    maxima_ptr,  # float32 [A, NUM_BLOCKS], as the next four: what _block_kernel wrote
    weights_ptr,
    above_ptr,
    top_keys_ptr,
    top_ids_ptr,
    out_ptr,  # int32 [A, 3 + 2 num_top], see token_logprobs
    stride_logits,
    num_top,
    stride_out,
    NUM_BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    MAX_TOP: tl.constexpr,
):
    entry = tl.program_id(0)
    index = entry
    if rows_ptr is not None:
        index = tl.load(rows_ptr + entry)
    token_id = tl.load(token_ids_ptr + index)
    chosen = tl.load(logits_ptr + index.to(tl.int64) * stride_logits + token_id).to(tl.float32)
    blocks = tl.arange(0, PADDED_BLOCKS)
    inside = blocks < NUM_BLOCKS
    places = entry * NUM_BLOCKS + blocks
    maxima = tl.load(maxima_ptr + places, mask=inside, other=-float("inf"))
    weights = tl.load(weights_ptr + places, mask=inside, other=0.0)
    maximum = tl.max(maxima, 0)
    normaliser = maximum + tl.log(tl.sum(weights * tl.exp(maxima - maximum), 0))
    above = tl.sum(tl.load(above_ptr + places, mask=inside, other=0), 0)
    out_ptr += entry * stride_out
    tl.store(out_ptr, token_id)
    tl.store(out_ptr + 1, (chosen - normaliser).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2, above + 1)

    # In the order of blocks, then ranks: equal logits stand in the order of their ids.
    slots = tl.arange(0, PADDED_BLOCKS * MAX_TOP)
    filled = (slots // MAX_TOP < NUM_BLOCKS) & (slots % MAX_TOP < num_top)
    first = entry.to(tl.int64) * (NUM_BLOCKS * MAX_TOP)
    keys = tl.load(top_keys_ptr + first + slots, mask=filled, other=TAKEN)
    for rank in range(num_top):
        key, winner = tl.max(keys, 0, return_indices=True)
        tl.store(out_ptr + 3 + rank, tl.load(top_ids_ptr + first + winner))
        logprob = value_of(key, 0) - normaliser
        tl.store(out_ptr + 3 + num_top + rank, logprob.to(tl.int32, bitcast=True))
        keys = tl.where(slots == winner, TAKEN, keys)


def token_logprobs(
    logits: Tensor, rows: Tensor | None, token_ids: Tensor, num_top: int, out: Tensor
) -> None:
    """Entries of A rows into `out`, int32 [A, 3 + 2 num_top].

    An entry: the token, the bits of its float32 log probability, its rank (1 + the number of
    strictly more likely tokens), then ids and log probabilities of the num_top most likely ones.
    logits [S or more, V]; rows int32 [A] of the logits, whose tokens are token_ids[rows], or None:
    row a of the logits goes with token_ids[a]. token_ids int32.
    """
    num_entries, vocab_size = len(token_ids if rows is None else rows), logits.shape[1]
    assert logits.stride(1) == 1, logits.stride()
    assert out.shape == (num_entries, 3 + 2 * num_top), out.shape
    assert token_ids.dtype == out.dtype == torch.int32
    assert 0 <= num_top <= min(MAX_TOP, vocab_size), num_top
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    device = logits.device
    per_block = (num_entries, num_blocks)
    top = (num_entries, num_blocks, MAX_TOP)
    # A tensor each: Triton compiles anew for a pointer whose alignment is another one.
    stages = (
        torch.empty(per_block, dtype=torch.float32, device=device),
        torch.empty(per_block, dtype=torch.float32, device=device),
        torch.empty(per_block, dtype=torch.int32, device=device),
        torch.empty(top, dtype=torch.int32, device=device),
        torch.empty(top, dtype=torch.int32, device=device),
    )
    stride = logits.stride(0)
    _block_kernel[(num_entries, num_blocks)](
        logits,
        rows,
        token_ids,
        *stages,
        stride,
        num_top,
        vocab_size,
        BLOCK,
        MAX_TOP,
        num_warps=4,
    )
    _merge_kernel[(num_entries,)](
        logits,
        rows,
        token_ids,
        *stages,
        out,
        stride,
        num_top,
        out.stride(0),
        num_blocks,
        triton.next_power_of_2(num_blocks),
        MAX_TOP,
        num_warps=4,
    )


def compile_cases() -> list[CompileCase]:
    floats, integers, vocab_size = torch.float32, torch.int32, 128_256
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    stages = (floats, floats, integers, integers, integers)
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (None, integers):
            name = f"{str(dtype).removeprefix('torch.')}{'_rows' if rows else ''}"
            tensors = (dtype, rows, integers, *stages)
            cases.append(
                CompileCase(
                    f"logprobs_block_{name}",
                    _block_kernel,
                    (*tensors, vocab_size, 5),
                    {"VOCAB": vocab_size, "BLOCK": BLOCK, "MAX_TOP": MAX_TOP},
                    {"num_warps": 4},
                )
            )
            cases.append(
                CompileCase(
                    f"logprobs_merge_{name}",
                    _merge_kernel,
                    (*tensors, integers, vocab_size, 5, 13),
                    {
                        "NUM_BLOCKS": num_blocks,
                        "PADDED_BLOCKS": triton.next_power_of_2(num_blocks),
                        "MAX_TOP": MAX_TOP,
                    },
                    {"num_warps": 4},
                )
            )
    return cases
