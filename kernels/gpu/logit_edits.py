"""Edits of logits on the GPU: penalties, logit_bias, allowed_token_ids, bad_words, min_tokens.

In that order, into a float32 copy, since bfloat16 has no room for a bias of 0.1 at a logit of 30.
`_copy_rows_kernel`, a program per row and block of the vocabulary, copies and penalises; rows with
allowed_token_ids become -inf. `_set_kernel` writes one logit per entry: penalised raw logit plus
bias, for allowed tokens and biased ones. Bans come last, and all of them write -inf, so that
entries may coincide: `_ban_kernel` writes those that always hold or hold before min_tokens outputs,
`_bad_word_kernel`, a program per word of two tokens or more, those whose beginning the row's tail
ends with. Conditions are evaluated here, on what the device knows of the row.

Penalties read int16 counts [max_num_seqs, V]: the low 15 bits number the token in the output (up
to 32767), the sign bit says that it is in the prompt.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.compile import CompileCase
from kernels.gpu.sampling_table import (
    FREQUENCY_WORD,
    MIN_TOKENS_WORD,
    NUM_OUTPUTS_WORD,
    NUM_PROMPT_WORD,
    ONLY_ALLOWED_WORD,
    PENALISED_WORD,
    PRESENCE_WORD,
    REPETITION_WORD,
    TAIL,
    TAIL_WORD,
    load_float,
    request_of,
)

BLOCK = 2048  # as kernels/gpu/sampling.py
ENTRIES = 256  # of one program
IN_PROMPT = -0x8000  # the sign bit of a count


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """The edits of a batch. An entry's index is that of its row in the batch."""

    penalties: bool  # whether any row has some
    set_entries: Tensor | None  # int32 [3, E] index, token id, bits of the float32 bias
    ban_entries: Tensor | None  # int32 [3, E] index, token id, 1 if before min_tokens only
    words: Tensor | None  # int32 [4, W] index, last token, where the others start, their number
    word_tokens: Tensor | None  # int32 [all tokens of the words but the last ones]


@triton.jit
def _penalised(logits_ptr, counts_ptr, request, inside):
    """Logits after penalties: of one row's tokens, or of one token per entry and row."""
    x = tl.load(logits_ptr, mask=inside, other=-float("inf")).to(tl.float32)
    if counts_ptr is not None:
        repetition = load_float(request + REPETITION_WORD)
        presence = load_float(request + PRESENCE_WORD)
        frequency = load_float(request + FREQUENCY_WORD)
        wanted = inside.to(tl.int32) * tl.load(request + PENALISED_WORD) != 0
        counts = tl.load(counts_ptr, mask=wanted, other=0).to(tl.int32)
        number = (counts & 0x7FFF).to(tl.float32)
        x = tl.where(counts != 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x = x - tl.where(number > 0, presence, 0.0) - frequency * number
    return x


@triton.jit
def _copy_rows_kernel(
    logits_ptr,  # [S, VOCAB]
    rows_ptr,  # int32 [S] of the table
    table_ptr,  # int32 [max_num_seqs, WORDS]
    counts_ptr,  # int16 [max_num_seqs, VOCAB], None without penalties
    out_ptr,  # float32 [S, VOCAB]
    stride_logits,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < VOCAB
    request = request_of(table_ptr, rows_ptr, index)
    if counts_ptr is not None:
        counts_ptr += tl.load(rows_ptr + index).to(tl.int64) * VOCAB + offs
    index = index.to(tl.int64)
    if tl.load(request + ONLY_ALLOWED_WORD) != 0:
        x = tl.full((BLOCK,), -float("inf"), tl.float32)
    else:
        x = _penalised(logits_ptr + index * stride_logits + offs, counts_ptr, request, inside)
    tl.store(out_ptr + index * VOCAB + offs, x, mask=inside)


@triton.jit(do_not_specialize=["num_entries"])
def _set_kernel(
    logits_ptr,  # [S, VOCAB]
    rows_ptr,  # int32 [S]
    table_ptr,  # int32 [max_num_seqs, WORDS]
    counts_ptr,  # int16 [max_num_seqs, VOCAB], None without penalties
    out_ptr,  # float32 [S, VOCAB]
    entries_ptr,  # int32 [3, num_entries] index, token id, bits of the bias
    stride_logits,
    num_entries,
    VOCAB: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    offs = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = offs < num_entries
    index = tl.load(entries_ptr + offs, mask=inside, other=0).to(tl.int64)
    token_ids = tl.load(entries_ptr + num_entries + offs, mask=inside, other=0)
    bias = tl.load(entries_ptr + 2 * num_entries + offs, mask=inside, other=0)
    if counts_ptr is not None:
        counts_ptr += tl.load(rows_ptr + index).to(tl.int64) * VOCAB + token_ids
    x = _penalised(
        logits_ptr + index * stride_logits + token_ids,
        counts_ptr,
        request_of(table_ptr, rows_ptr, index),
        inside,
    )
    x += bias.to(tl.float32, bitcast=True)
    tl.store(out_ptr + index * VOCAB + token_ids, x, mask=inside)


@triton.jit(do_not_specialize=["num_entries"])
def _ban_kernel(
    rows_ptr,  # int32 [S]
    table_ptr,  # int32 [max_num_seqs, WORDS]
    out_ptr,  # float32 [S, VOCAB]
    entries_ptr,  # int32 [3, num_entries] index, token id, whether before min_tokens only
    num_entries,
    VOCAB: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    offs = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = offs < num_entries
    index = tl.load(entries_ptr + offs, mask=inside, other=0).to(tl.int64)
    token_ids = tl.load(entries_ptr + num_entries + offs, mask=inside, other=0)
    early_only = tl.load(entries_ptr + 2 * num_entries + offs, mask=inside, other=0)
    request = request_of(table_ptr, rows_ptr, index)
    early = tl.load(request + NUM_OUTPUTS_WORD) < tl.load(request + MIN_TOKENS_WORD)
    out_ptr += index * VOCAB + token_ids
    tl.store(out_ptr, -float("inf"), mask=inside & (early | (early_only == 0)))


@triton.jit(do_not_specialize=["num_words"])
def _bad_word_kernel(
    rows_ptr,  # int32 [S]
    table_ptr,  # int32 [max_num_seqs, WORDS]
    out_ptr,  # float32 [S, VOCAB]
    words_ptr,  # int32 [4, num_words] index, last token, start and number of those before it
    word_tokens_ptr,  # int32
    num_words,
    VOCAB: tl.constexpr,
):
    words_ptr += tl.program_id(0)
    index = tl.load(words_ptr).to(tl.int64)
    last = tl.load(words_ptr + num_words)
    start, length = tl.load(words_ptr + 2 * num_words), tl.load(words_ptr + 3 * num_words)
    request = request_of(table_ptr, rows_ptr, index)
    num_tokens = tl.load(request + NUM_PROMPT_WORD) + tl.load(request + NUM_OUTPUTS_WORD)
    offs = tl.arange(0, TAIL)
    places = num_tokens - length + offs
    compared = (offs < length) & (places >= 0)
    recent = tl.load(request + TAIL_WORD + places % TAIL, mask=compared, other=0)
    wanted = tl.load(word_tokens_ptr + start + offs, mask=compared, other=0)
    differs = tl.max((recent != wanted).to(tl.int32), 0) > 0
    matches = (num_tokens >= length) & (differs == 0)
    tl.store(out_ptr + index * VOCAB + last, -float("inf"), mask=matches)


def edit_logits(
    logits: Tensor, rows: Tensor, table: Tensor, counts: Tensor | None, edits: LogitEdits
) -> Tensor:
    """float32 [S, V], edited; logits [S or more, V] stay as they are.

    rows int32 [S]; table int32 [max_num_seqs, WORDS]; counts int16 [max_num_seqs, V].
    """
    num_rows, vocab_size = len(rows), logits.shape[1]
    assert logits.stride(1) == 1, logits.stride()
    assert len(logits) >= num_rows, logits.shape
    assert counts is None or counts.dtype == torch.int16
    out = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
    counts = counts if edits.penalties else None
    stride = logits.stride(0)
    grid = (num_rows, triton.cdiv(vocab_size, BLOCK))
    _copy_rows_kernel[grid](
        logits, rows, table, counts, out, stride, vocab_size, BLOCK, num_warps=4
    )
    if edits.set_entries is not None:
        num_entries = edits.set_entries.shape[1]
        _set_kernel[(triton.cdiv(num_entries, ENTRIES),)](
            logits,
            rows,
            table,
            counts,
            out,
            edits.set_entries,
            stride,
            num_entries,
            vocab_size,
            ENTRIES,
            num_warps=4,
        )
    if edits.ban_entries is not None:
        num_entries = edits.ban_entries.shape[1]
        _ban_kernel[(triton.cdiv(num_entries, ENTRIES),)](
            rows, table, out, edits.ban_entries, num_entries, vocab_size, ENTRIES, num_warps=4
        )
    if edits.words is not None:
        num_words = edits.words.shape[1]
        _bad_word_kernel[(num_words,)](
            rows, table, out, edits.words, edits.word_tokens, num_words, vocab_size, num_warps=1
        )
    return out


def compile_cases() -> list[CompileCase]:
    integers, vocab_size = torch.int32, 128_256
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for counts in (None, torch.int16):
            name = f"{str(dtype).removeprefix('torch.')}{'_counts' if counts else ''}"
            tensors = (dtype, integers, integers, counts, torch.float32)
            cases.append(
                CompileCase(
                    f"edit_copy_{name}",
                    _copy_rows_kernel,
                    (*tensors, vocab_size),
                    {"VOCAB": vocab_size, "BLOCK": BLOCK},
                    {"num_warps": 4},
                )
            )
            cases.append(
                CompileCase(
                    f"edit_set_{name}",
                    _set_kernel,
                    (*tensors, integers, vocab_size, 5),
                    {"VOCAB": vocab_size, "ENTRIES": ENTRIES},
                    {"num_warps": 4},
                )
            )
    rows = (integers, integers, torch.float32, integers)
    vocab = {"VOCAB": vocab_size}
    ban = vocab | {"ENTRIES": ENTRIES}
    cases.append(CompileCase("edit_ban", _ban_kernel, (*rows, 5), ban, {"num_warps": 4}))
    word = (*rows, integers, 5)
    cases.append(CompileCase("edit_bad_word", _bad_word_kernel, word, vocab, {"num_warps": 1}))
    return cases
