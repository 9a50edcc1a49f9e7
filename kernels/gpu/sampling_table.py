"""The request table of the GPU sampler: what the kernels know of a row, 320 bytes in int32 words.

int32 [max_num_seqs, WORDS] in device memory. A record is written whole when a sequence enters the
running set; from then on only num_outputs and the tail change, and the sampling kernel itself
changes them, so that a steady step uploads nothing.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

TAIL_TOKENS = 64  # a bad word has at most 64 tokens, of which 63 precede the one to be banned

RECORD = np.dtype(
    [
        ("seed", np.uint64),
        ("top_p", np.float64),  # 0.3 in float32 would keep a fourth of ten equal tokens
        ("top_k", np.int32),  # vocab_size when off
        ("min_p", np.float32),
        ("inverse_temperature", np.float32),  # 0 for greedy
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("min_tokens", np.int32),
        ("only_allowed", np.int32),  # 1: no token but those that the edits set
        ("num_prompt", np.int32),
        ("num_outputs", np.int32),
        ("penalised", np.int32),  # 1: has any of the three penalties
        ("unused", np.int32),
        ("tail", np.int32, TAIL_TOKENS),  # token i of prompt and output at i % 64
    ]
)
assert RECORD.itemsize % 16 == 0


def _word(name: str) -> tl.constexpr:
    fields = RECORD.fields
    assert fields is not None
    return tl.constexpr(fields[name][1] // 4)


WORDS = tl.constexpr(RECORD.itemsize // 4)
TAIL = tl.constexpr(TAIL_TOKENS)
SEED_WORD = _word("seed")
TOP_P_WORD = _word("top_p")
TOP_K_WORD = _word("top_k")
MIN_P_WORD = _word("min_p")
SCALE_WORD = _word("inverse_temperature")
REPETITION_WORD = _word("repetition")
PRESENCE_WORD = _word("presence")
FREQUENCY_WORD = _word("frequency")
MIN_TOKENS_WORD = _word("min_tokens")
ONLY_ALLOWED_WORD = _word("only_allowed")
NUM_PROMPT_WORD = _word("num_prompt")
NUM_OUTPUTS_WORD = _word("num_outputs")
PENALISED_WORD = _word("penalised")
TAIL_WORD = _word("tail")


def allocate_table(max_num_seqs: int, device: torch.device) -> Tensor:
    return torch.zeros((max_num_seqs, WORDS.value), dtype=torch.int32, device=device)


@triton.jit
def request_of(table_ptr, rows_ptr, index):
    """The record of the sequence to which row `index` of the logits belongs."""
    return table_ptr + tl.load(rows_ptr + index).to(tl.int64) * WORDS


@triton.jit
def load_float(pointer):
    return tl.load(pointer).to(tl.float32, bitcast=True)


@triton.jit
def load_word64(pointer):
    low = tl.load(pointer).to(tl.int64) & 0xFFFFFFFF
    return low | (tl.load(pointer + 1).to(tl.int64) << 32)
