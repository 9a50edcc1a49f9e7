"""rope_and_store: values against float64, cached bytes against kernels/kv_layout.py bit by bit."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.gpu import rope_store
from kernels.gpu.step import GpuStep
from kernels.kv_layout import LayerCache, QuantizedKV, dequantize_kv, quantize_kv
from kernels.partials import Partials
from kernels.rope import RotaryTable, rope_and_store, signed_sin

HEADS, KV_HEADS = 2, 1
NUM_BLOCKS, BLOCK_SIZE, POSITIONS = 4, 16, 50
EPS = 1e-5


@dataclass(frozen=True)
class Form:
    head_dim: int
    rotary_dim: int
    dtype: torch.dtype = torch.float32
    splits: int = 0
    norm: bool = False
    num_tokens: int = 5
    tokens_per_program: int = rope_store.BLOCK_T


FORMS = {
    **{f"head of {size}": Form(size, size) for size in (64, 80, 96, 128, 256)},
    "small head": Form(16, 16),
    "partial rotary": Form(80, 32, splits=2),
    "very partial rotary": Form(64, 2, torch.bfloat16, norm=True),
    "parts": Form(128, 128, torch.bfloat16, splits=3),
    "parts of one token": Form(64, 64, torch.bfloat16, 4, norm=True, num_tokens=1),
    "head norm": Form(64, 64, norm=True),
    "head norm of an odd head": Form(80, 80, torch.float16, 1, norm=True),
    "lone tokens": Form(96, 96, torch.float16, num_tokens=3, tokens_per_program=1),
    "blocks of tokens": Form(64, 64, num_tokens=33),
}


@dataclass(frozen=True)
class Case:
    form: Form
    qkv: Tensor | Partials
    norm: Tensor | None
    table: RotaryTable
    step: GpuStep

    @property
    def stored(self) -> Tensor:
        return self.step.slot_mapping >= 0

    def run(self, policy: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, LayerCache]:
        lone = self.form.tokens_per_program == 1
        monkeypatch.setattr(rope_store, "MAX_LONE_TOKENS", self.form.num_tokens if lone else 0)
        cache, heads = poisoned(self.form, policy), (HEADS, KV_HEADS, self.form.head_dim)
        qkv, positions = self.qkv, self.step.positions
        q = rope_and_store(qkv, self.norm, EPS, self.table, positions, cache, self.step, *heads)
        assert q.shape == (self.form.num_tokens, HEADS, self.form.head_dim)
        return q, cache


def poisoned(form: Form, policy: int) -> LayerCache:
    """What was not written stays NaN, or a byte pattern."""
    if not policy:
        shape = (NUM_BLOCKS, 2 * KV_HEADS, BLOCK_SIZE, form.head_dim)
        return torch.full(shape, torch.nan, dtype=form.dtype)
    cache = QuantizedKV.allocate(NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, form.head_dim, policy, "cpu")
    for words in (cache.k, cache.v, cache.params):
        words.fill_(0x5A5A5A5A)
    return cache


def make_case(form: Form) -> Case:
    draw = torch.Generator().manual_seed(form.head_dim + form.num_tokens)
    width = (HEADS + 2 * KV_HEADS) * form.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    qkv: Tensor | Partials = normal(form.num_tokens, width).to(form.dtype)
    if form.splits:
        data = normal(form.splits, form.num_tokens, width)
        qkv = Partials(data, normal(width).to(form.dtype), form.dtype)
    weight = normal(HEADS + KV_HEADS, form.head_dim).to(form.dtype)
    angles = (7 * normal(POSITIONS, form.rotary_dim // 2)).repeat(1, 2)
    positions = torch.randint(POSITIONS, (form.num_tokens,), generator=draw, dtype=torch.int32)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=draw)[: form.num_tokens]
    slots[1::4] = -1
    nothing = torch.zeros(0, dtype=torch.int32)
    return Case(
        form,
        qkv,
        weight if form.norm else None,
        RotaryTable(angles.cos().to(form.dtype), signed_sin(angles.sin().to(form.dtype))),
        GpuStep(
            input_ids=nothing,
            positions=positions,
            slot_mapping=slots,
            query_start_loc=nothing,
            context_lens=nothing,
            rows=nothing,
            block_tables=nothing,
            num_decodes=0,
            max_query_len=0,
            max_context_len=0,
            block_size=BLOCK_SIZE,
        ),
    )


def exact(case: Case) -> Tensor:
    """float64 [T, heads, D] of queries, keys and values, rounded nowhere."""
    qkv, form = case.qkv, case.form
    if isinstance(qkv, Partials):
        assert qkv.bias is not None
        x = qkv.data.double().sum(0) + qkv.bias.double()
    else:
        x = qkv.double()
    x = x.view(form.num_tokens, -1, form.head_dim)
    turned, values = x[:, : HEADS + KV_HEADS], x[:, HEADS + KV_HEADS :]
    if case.norm is not None:
        square = turned.square().mean(-1, keepdim=True)
        turned = turned / (square + EPS).sqrt() * case.norm.double()
    half = form.rotary_dim // 2
    cos, sin = (part.double()[:, :, half:] for part in case.table.at(case.step.positions.long()))
    a, b = turned[..., :half], turned[..., half : form.rotary_dim]
    rest = turned[..., form.rotary_dim :]
    return torch.cat((torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1), values), 1)


def by_slot(cache: Tensor) -> Tensor:
    return cache.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("name", FORMS)
def test_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of padding are written, its keys and values are not."""
    case = make_case(FORMS[name])
    q, cache = case.run(0, monkeypatch)
    assert isinstance(cache, Tensor)
    found, expected = by_slot(cache), exact(case)
    eps = torch.finfo(case.form.dtype).eps
    size = expected.abs().amax(-1, keepdim=True)  # what is cancelled by the rotation counts

    def check(x: Tensor, rows: slice, tokens: Tensor) -> None:
        error = (x.double() - expected[tokens, rows]).abs()
        assert (error <= 3 * eps * size[tokens, rows]).all()

    check(q, slice(HEADS), torch.ones_like(case.stored))
    check(found[case.step.slot_mapping[case.stored]], slice(HEADS, None), case.stored)
    assert found.isnan().any(-1).all(-1).sum() == len(found) - case.stored.sum()


@pytest.mark.parametrize("policy", [4, 8, 16])
@pytest.mark.parametrize("name", FORMS)
def test_bytes(name: str, policy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the torch twin for what a plain cache would hold; all others as they were."""
    case = make_case(FORMS[name])
    plain_q, plain = case.run(0, monkeypatch)
    q, cache = case.run(policy, monkeypatch)
    assert isinstance(plain, Tensor)
    assert isinstance(cache, QuantizedKV)
    expected = poisoned(case.form, policy)
    assert isinstance(expected, QuantizedKV)
    slots = case.step.slot_mapping[case.stored]
    kv = by_slot(plain)[slots]
    expected.store(kv, slots)
    for part in ("k", "v", "params"):
        assert torch.equal(getattr(cache, part), getattr(expected, part)), part
    assert torch.equal(q, plain_q)
    keys, values = cache.gather(torch.arange(NUM_BLOCKS)[None], torch.float32)
    again = torch.cat((keys[0], values[0])).transpose(0, 1)[slots]
    assert torch.equal(again, dequantize_kv(*quantize_kv(kv, policy), policy))


@pytest.mark.parametrize("policy", [4, 8, 16])
@pytest.mark.parametrize("value", [0.0, 1.5, -(2.0**-20), 3000.0], ids=str)
def test_equal_values(value: float, policy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No division by zero, no overflow; what fp8 holds below its normal numbers included."""
    case = make_case(Form(64, 64, num_tokens=4))
    assert isinstance(case.qkv, Tensor)
    case.qkv.fill_(value)
    case.qkv[0, -1] = value / 500
    _, plain = case.run(0, monkeypatch)
    _, cache = case.run(policy, monkeypatch)
    expected = poisoned(case.form, policy)
    assert isinstance(plain, Tensor)
    assert isinstance(cache, QuantizedKV)
    assert isinstance(expected, QuantizedKV)
    slots = case.step.slot_mapping[case.stored]
    expected.store(by_slot(plain)[slots], slots)
    for part in ("k", "v", "params"):
        assert torch.equal(getattr(cache, part), getattr(expected, part)), part


@pytest.mark.filterwarnings("ignore:invalid value encountered in")
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("policy", [4, 8, 16])
def test_a_nan_shows(policy: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """But in no byte of fp8, which would outlive its sequence."""
    case = make_case(Form(64, 64, num_tokens=1))
    assert isinstance(case.qkv, Tensor)
    case.qkv[0, [2 * 64 + 5, 3 * 64 + 40]] = value  # of the key and of the value
    _, cache = case.run(policy, monkeypatch)
    assert isinstance(cache, QuantizedKV)
    slot = case.step.slot_mapping[0]
    for found in cache.gather(torch.arange(NUM_BLOCKS)[None], torch.float32):
        assert found[0, 0, slot].isnan().any()
    if policy == 16:
        for words in (cache.k, cache.v):
            assert not words.view(torch.float8_e4m3fn).float().isnan().any()


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache of which two pages are touched."""
    case = make_case(Form(64, 64, num_tokens=1))
    far = 2**31 // (KV_HEADS * BLOCK_SIZE * 64) + 1
    cache = QuantizedKV.allocate(far + 1, KV_HEADS, BLOCK_SIZE, 64, 8, "cpu")
    step = replace(case.step, slot_mapping=torch.tensor([far * BLOCK_SIZE + 3]))
    heads = HEADS, KV_HEADS, 64
    rope_and_store(case.qkv, None, EPS, case.table, step.positions, cache, step, *heads)
    _, near = case.run(8, monkeypatch)
    assert isinstance(near, QuantizedKV)
    slot = int(case.step.slot_mapping[0])
    expected = near.gather(torch.tensor([[slot // BLOCK_SIZE]]), torch.float32)
    for found, part in zip(
        cache.gather(torch.tensor([[far]]), torch.float32), expected, strict=True
    ):
        assert torch.equal(found[:, :, 3], part[:, :, slot % BLOCK_SIZE])
