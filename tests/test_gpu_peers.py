"""The GPU benchmark's peers behind their real schemas, with plain torch in the libraries' place."""

import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.bench import worst_row_error
from benchmarks.gpu.caches import attention_reference, make_step, random_cache, random_tables
from benchmarks.gpu.peer_libraries import LIBRARIES, pack, strip
from benchmarks.gpu.peers import MarlinWeight, flash_attention_3, marlin_linear, marlin_weight
from benchmarks.gpu.weights import random_int4

# As the libraries of vLLM 0.24.0 register them.
SCHEMAS = {
    "_C": (
        "gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, "
        "int num_bits, bool is_a_8bit) -> Tensor",
        "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, "
        "Tensor b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, "
        "Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor workspace, int b_type_id, "
        "SymInt size_m, SymInt size_n, SymInt size_k, bool is_k_full, bool use_atomic_add, "
        "bool use_fp32_reduce, bool is_zp_float) -> Tensor",
    ),
    "_vllm_fa3_C": (
        "fwd(Tensor(a!) q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, "
        "Tensor(b!)? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, "
        "Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, "
        "Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
        "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, "
        "Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left, "
        "int window_size_right, float softcap, bool is_rotary_interleaved, "
        "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, "
        "Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]",
        "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, "
        "int num_heads, int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, "
        "Tensor seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, "
        "Tensor? seqused_q, Tensor? leftpad_k, int? page_size, int max_seqlen_k_new, "
        "bool is_causal, int window_size_left, int window_size_right, bool has_softcap, "
        "int num_splits, bool? pack_gqa, int sm_margin) -> Tensor",
    ),
}


class Libraries:
    """What the operations are called with, by name of their parameters; and what they compute."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self._kept: list[Any] = []
        for namespace, schemas in SCHEMAS.items():
            library: Any = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
            self._kept.append(library)
            for schema in schemas:
                name = library.define(schema)
                parameters = [a.name for a in torch._C.parse_schema(f"{schema}").arguments]
                library.impl(name, self._recorded(name, parameters), "CompositeExplicitAutograd")

    def _recorded(self, name: str, parameters: list[str]) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls[name] = dict(zip(parameters, arguments, strict=True))
            return getattr(self, f"_{name}")(**self.calls[name])

        return call

    def close(self) -> None:
        for library in self._kept:
            library._destroy()

    @staticmethod
    def _gptq_marlin_repack(b_q_weight: Tensor, **rest: Any) -> Tensor:
        return b_q_weight.clone()

    @staticmethod
    def _marlin_gemm(
        a: Tensor, b_q_weight: Tensor, b_scales: Tensor, b_zeros_or_none: Tensor, **rest: Any
    ) -> Tensor:
        """Over weights packed as GPTQ's; scales and zero points in Marlin's order."""
        order = [i + 8 * j for i in range(8) for j in range(8)]
        shifts = torch.arange(0, 32, 4)
        q = (b_q_weight[:, None] >> shifts[None, :, None] & 15).flatten(0, 1)
        zeros = (b_zeros_or_none[..., None] >> shifts & 15).flatten(1)
        zeros = _undone(_undone(zeros, [0, 2, 4, 6, 1, 3, 5, 7]), order)
        scales = _undone(b_scales, order)
        repeats = len(q) // len(scales)
        return a @ (
            (q - zeros.repeat_interleave(repeats, 0)) * scales.repeat_interleave(repeats, 0)
        )

    @staticmethod
    def _fwd(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None,
        seqused_k: Tensor | None, page_table: Tensor | None, softmax_scale: float, **rest: Any,
    ) -> list[Tensor]:  # fmt: skip
        out = torch.empty_like(q)
        ends = cu_seqlens_q.tolist()
        for row, (start, end) in enumerate(itertools.pairwise(ends)):
            if page_table is None:
                assert cu_seqlens_k is not None
                keys, values = (x[cu_seqlens_k[row] : cu_seqlens_k[row + 1]] for x in (k, v))
            else:
                assert seqused_k is not None
                keys, values = (x[page_table[row]].flatten(0, 1)[: seqused_k[row]] for x in (k, v))
            repeats = q.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * softmax_scale
            hidden = torch.ones(scores.shape[1:]).tril(len(keys) - (end - start)) == 0
            p = scores.masked_fill(hidden, -math.inf).softmax(-1)
            out[start:end] = torch.einsum("hqk,khd->qhd", p, values)
        return [out, out.new_empty(0), out.new_empty(0), out.new_empty(0)]

    @staticmethod
    def _get_scheduler_metadata(**rest: Any) -> Tensor:
        return torch.zeros(1, dtype=torch.int32)


def _undone(x: Tensor, order: list[int]) -> Tensor:
    """Columns, in runs as long as the order, where they were."""
    return x.reshape(-1, len(order))[:, torch.tensor(order).argsort()].view(x.shape)


@pytest.fixture
def libraries() -> Iterator[Libraries]:
    made = Libraries()
    yield made
    made.close()


def test_marlin_is_called_as_its_schema_says(libraries: Libraries) -> None:
    q, zeros, scales, weight = random_int4(128, 256, 128, torch.device("cpu"), torch.float32)
    x = torch.randn(3, 256)
    packed = marlin_weight(q, zeros, scales)
    assert isinstance(packed, MarlinWeight)
    assert worst_row_error(marlin_linear(x, packed), x @ weight.t()) < 1e-5
    called = libraries.calls["marlin_gemm"]
    assert [called[f"size_{dim}"] for dim in "mnk"] == [3, 128, 256]
    assert called["b_type_id"] == 1125899906843648  # vLLM's scalar_types.uint4.id
    switches = ("is_k_full", "use_atomic_add", "use_fp32_reduce", "is_zp_float")
    assert [called[name] for name in switches] == [True, False, True, False]


@pytest.mark.parametrize("paged", [True, False])
def test_flash_attention_3_is_called_as_its_schema_says(libraries: Libraries, paged: bool) -> None:
    """Single queries over pages, and a whole prompt over its own keys."""
    lens = [70, 100] if paged else [100]
    queries = [1, 1] if paged else lens
    device = torch.device("cpu")
    tables = random_tables(len(lens), 128, 64, device)
    cache = random_cache(tables.numel(), 2, 64, 16, 0, torch.float32, device)
    step = make_step(queries, lens, len(lens) if paged else 0, tables, 64)
    q = torch.randn(sum(queries), 4, 16)
    k, v = (half.transpose(1, 2) for half in (cache.keys, cache.values))
    plan = peers.flash_attention_3_plan(q, k, step) if paged else None
    if not paged:
        k, v = (x[tables[0]].flatten(0, 1)[: lens[0]] for x in (k, v))
    found = flash_attention_3(q, k, v, step, 0.25, plan)
    expected = attention_reference(q, cache, step, 0.25)
    assert worst_row_error(found.flatten(0, 1), expected.flatten(0, 1)) < 1e-5
    called = libraries.calls["fwd"]
    assert (called["max_seqlen_q"], called["max_seqlen_k"]) == (max(queries), 100)
    assert called["scheduler_metadata"] is plan
    assert called["is_causal"]
    if paged:
        planned = libraries.calls["get_scheduler_metadata"]
        names = ("batch_size", "num_heads", "num_heads_k", "headdim", "page_size", "is_causal")
        assert [planned[name] for name in names] == [2, 4, 2, 16, 64, True]


def test_libraries_are_looked_for_where_they_are_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(peers.FOLDER, str(tmp_path))
    peers.load.cache_clear()
    with pytest.raises(FileNotFoundError, match=f"neither in {tmp_path}"):
        peers.load(peers.MARLIN)
    (tmp_path / peers.MARLIN).write_bytes(b"no library")
    with pytest.raises(OSError, match=r"Could not load|invalid ELF header|file too short"):
        peers.load(peers.MARLIN)


def _bundle(*entries: tuple[int, int, bytes]) -> bytes:
    content = b"".join(
        struct.pack("<HHIQIIHHI", kind, 257, 64, len(code), 0, 0, 0, 1, capability).ljust(64, b"\0")
        + code
        for kind, capability, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


def test_a_library_keeps_the_code_of_one_gpu(tmp_path: Path) -> None:
    both = _bundle((1, 80, b"p" * 24), (2, 80, b"old" * 8), (2, 90, b"new" * 8))
    none = _bundle((2, 75, b"a" * 48), (2, 120, b"b" * 24))
    ptx = _bundle((1, 75, b"older" * 8), (1, 80, b"newer" * 8), (2, 80, b"c" * 8), (1, 100, b"d"))
    library = b"start" + both + b"between \x50\xed\x55\xba" + none + ptx + b"end"
    kept = strip(library)
    assert len(kept) == len(library)
    assert b"new" * 8 in kept
    assert b"old" not in kept
    assert b"ppp" not in kept
    assert kept.startswith(b"start" + _bundle((2, 90, b"new" * 8)) + b"\0")
    assert _bundle((2, 120, b"b" * 24)) in kept
    assert _bundle((1, 80, b"newer" * 8)) in kept
    assert b"older" not in kept
    assert kept.endswith(b"\0end")

    wheel = tmp_path / "vllm.whl"
    with ZipFile(wheel, "w") as content:
        for name in LIBRARIES:
            content.writestr(f"vllm/{name}", library)
    assert [path.name for path in pack(wheel, tmp_path)] == [f"{name}.xz" for name in LIBRARIES]
    with ZipFile(wheel, "w") as content:
        content.writestr("vllm/other.so", library)
    with pytest.raises(SystemExit, match="has no _C_stable"):
        pack(wheel, tmp_path)
