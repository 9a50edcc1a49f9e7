"""Paged attention equals float64 attention over the same tokens, wherever their blocks lie."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import attention_plan, cpu
from kernels.attention import AttentionMetadata, is_native, paged_attention, store_kv

BLOCK = 4
MIXES = {  # (tokens in the cache already, new tokens) of each sequence, decode rows first
    "one token of all": [(0, 1)],
    "one decode": [(9, 1)],
    "decodes of one length": [(11, 1)] * 3,
    "decodes of many lengths": [(3, 1), (30, 1), (7, 1), (0, 1), (15, 1)],
    "prefill": [(0, 7)],
    "prefills": [(0, 5), (0, 1), (0, 12)],
    "chunks behind a prefix": [(8, 5), (13, 3)],
    "decodes and prefills": [(5, 1), (16, 1), (0, 9), (10, 6)],
}
HEADS = [(4, 4, 24), (4, 2, 64), (3, 1, 80), (8, 1, 16)]  # query heads, kv heads, head size

NATIVE_HEADS = [(4, 4, 32), (8, 2, 64), (3, 3, 96), (6, 1, 128), (16, 1, 256)]


@dataclass(frozen=True, slots=True)
class Case:
    """A step whose earlier tokens are stored; new keys and values are still to be."""

    q: Tensor  # float64 [T, Hq, D]
    kv: Tensor  # float64 [T, 2 * Hkv, D]
    cache: Tensor
    meta: AttentionMetadata
    expected: Tensor  # float64 [T, Hq, D]


def make_case(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    window: int | None,
    dtype: torch.dtype,
    block_size: int = BLOCK,
) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype).double()

    blocks = [-(-(old + new) // block_size) for old, new in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=draw).numpy().astype(np.int32)
    # What nobody wrote is NaN, as a request whose numbers overflowed leaves it in blocks that
    # others get: not even multiplied by 0 may it be read.
    shape = len(order), 2 * num_kv_heads, block_size, head_dim
    cache = torch.full(shape, torch.nan, dtype=torch.float64)
    tables = np.zeros((len(lengths), max(blocks)), dtype=np.int32)
    queries, keys, slots, expected = [], [], [], []
    for seq, (old, new) in enumerate(lengths):
        start = sum(blocks[:seq])
        tables[seq, : blocks[seq]] = order[start : start + blocks[seq]]
        q, kv = normal(new, num_heads, head_dim), normal(old + new, 2 * num_kv_heads, head_dim)
        for position in range(old):
            block, offset = tables[seq, position // block_size], position % block_size
            cache[block, :, offset] = kv[position]
        slots += [
            tables[seq, position // block_size] * block_size + position % block_size
            for position in range(old, old + new)
        ]
        expected.append(reference(q, kv[:, :num_kv_heads], kv[:, num_kv_heads:], window))
        queries.append(q)
        keys.append(kv[old:])
    meta = AttentionMetadata.build(
        query_start_loc=np.cumsum([0, *(new for _, new in lengths)], dtype=np.int32),
        context_lens=np.array([old + new for old, new in lengths], dtype=np.int32),
        block_tables=tables,
        slot_mapping=np.array(slots, dtype=np.int32),
        num_decodes=next((i for i, (_, new) in enumerate(lengths) if new > 1), len(lengths)),
        block_size=block_size,
        device="cpu",
    )
    return Case(torch.cat(queries), torch.cat(keys), cache, meta, torch.cat(expected))


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One query and one head at a time: q [n, Hq, D] are the last of k's and v's tokens."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for row in range(len(q)):
        position = len(k) - len(q) + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(q.shape[1]):
            seen = k[first : position + 1, head // group], v[first : position + 1, head // group]
            weights = torch.softmax(seen[0] @ q[row, head] * q.shape[2] ** -0.5, dim=0)
            out[row, head] = weights @ seen[1]
    return out


def run(case: Case, dtype: torch.dtype, window: int | None) -> Tensor:
    cache = case.cache.to(dtype)
    store_kv(case.kv.to(dtype), cache, case.meta)
    q = case.q.to(dtype)
    return paged_attention(q, cache, case.meta, q.shape[2] ** -0.5, window).double()


@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_equals_float64_attention(
    mix: str, heads: tuple[int, int, int], window: int | None
) -> None:
    case = make_case(MIXES[mix], heads, window, torch.float32)
    torch.testing.assert_close(
        run(case, torch.float32, window), case.expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", ["decodes of many lengths", "decodes and prefills"])
def test_sixteen_bit_error_is_the_rounding(mix: str, dtype: torch.dtype) -> None:
    """Weights and output are rounded once each; scores and sums are float32."""
    case = make_case(MIXES[mix], (4, 2, 64), None, dtype)
    error = (run(case, dtype, None) - case.expected).norm() / case.expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.skipif(cpu.library() is None, reason="no AMX, or installed without a compiler")
@pytest.mark.parametrize("window", [None, 1, 6, 33, 1000])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("heads", NATIVE_HEADS, ids=str)
def test_native_decodes(heads: tuple[int, int, int], block_size: int, window: int | None) -> None:
    lengths = [(old, 1) for old in (3, 30, 15, 0, 16, 31, 200)]
    case = make_case(lengths, heads, window, torch.bfloat16, block_size)
    assert is_native(case.q.bfloat16(), case.cache.bfloat16())
    error = (run(case, torch.bfloat16, window) - case.expected).norm() / case.expected.norm()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_decode_rows_gather_their_own_blocks() -> None:
    """Behind a sequence's end its first again: only what its last block has left is zeroed."""
    lengths = np.array([100, 40, 17], dtype=np.int32)
    tables = np.arange(21, dtype=np.int32).reshape(3, 7)
    planner = attention_plan.Planner(16, 2, 64, torch.float32, "cpu", None)
    (group,) = planner.decodes(lengths, tables).groups
    blocks = group.keys.rows.view(3, 4, 7)[:, 0] // 4
    assert blocks.tolist() == [[*range(7)], [7, 8, 9, *[7] * 4], [14, 15, *[14] * 5]]
    assert group.keys.foreign is not None
    seqs, places = (axis.tolist() for axis in group.keys.foreign)
    assert seqs == [1] * 8 + [2] * 15
    assert places == [*range(40, 48), *range(17, 32)]


def test_store_touches_only_its_slots() -> None:
    case = make_case(MIXES["decodes and prefills"], (4, 2, 64), None, torch.float32)
    before = case.cache.float().nan_to_num()
    after = before.clone()
    store_kv(case.kv.float(), after, case.meta)
    by_slot = after.transpose(1, 2).flatten(0, 1)
    assert torch.equal(by_slot[case.meta.slot_mapping], case.kv.float())
    untouched = np.setdiff1d(np.arange(len(by_slot)), case.meta.slot_mapping)
    assert torch.equal(by_slot[untouched], before.transpose(1, 2).flatten(0, 1)[untouched])


def test_a_strided_slice_is_stored_like_a_copy() -> None:
    """The decoder passes a slice of its fused projection."""
    case = make_case(MIXES["prefills"], (4, 2, 64), None, torch.float32)
    fused = torch.cat((case.q, case.kv), dim=1).float()
    cache, expected = case.cache.float(), case.cache.float()
    store_kv(fused[:, 4:], cache, case.meta)
    store_kv(case.kv.float(), expected, case.meta)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
    attended = paged_attention(fused[:, :4], cache, case.meta, 0.125, None)
    torch.testing.assert_close(attended.double(), case.expected, rtol=1e-4, atol=1e-5)


def test_long_prefills_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "QUERY_TILE", 5)
    for window in (None, 7):
        case = make_case([(6, 1), (0, 23), (9, 11)], (4, 2, 24), window, torch.float32)
        found = run(case, torch.float32, window)
        torch.testing.assert_close(found, case.expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gather_bytes", [1, 2 * 2 * 24 * 4 * 40])
def test_decode_rows_are_grouped(gather_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the rows are grouped, each is answered in its own place."""
    monkeypatch.setattr(attention_plan, "GATHER_BYTES", gather_bytes)
    lengths = [(old, 1) for old in (3, 30, 0, 17, 30, 8)]
    for window in (None, 5):
        case = make_case([*lengths, (4, 3)], (4, 2, 24), window, torch.float32)
        found = run(case, torch.float32, window)
        torch.testing.assert_close(found, case.expected, rtol=1e-4, atol=1e-5)


def test_a_window_reads_no_blocks_before_it() -> None:
    """A NaN outside the window, even in a block of the same sequence, does not show."""
    case = make_case([(21, 1), (10, 8)], (4, 2, 24), 4, torch.float32)
    tables = case.meta.block_tables
    case.cache[tables[0, :4]] = torch.nan  # positions 0 to 15 of 22, the window starts at 18
    case.cache[tables[1, :1]] = torch.nan  # positions 0 to 3 of 18, the first query sees 7 to 10
    found = run(case, torch.float32, 4)
    torch.testing.assert_close(found, case.expected, rtol=1e-4, atol=1e-5)
