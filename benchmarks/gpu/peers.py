"""Marlin and FlashAttention-3 as vLLM 0.24 builds them, called by the libraries' own schemas.

At hand where benchmarks/gpu/peer_libraries.py has put them, or where vLLM is installed; it is not
imported.
"""

import lzma
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.peer_libraries import LIBRARIES
from kernels.gpu.step import GpuStep

FOLDER = "MANTA_PEER_LIBRARIES"  # the environment variable that tells a stage's process
MARLIN, FLASH_ATTENTION_3 = LIBRARIES

UINT4 = 1 << 50 | 4 << 8  # vLLM's number of the type: NaNs as in IEEE 754, four bits, unsigned
NIBBLES = 8  # of an int32
# Marlin's tensor core fragments want columns of 64 in this order, and of 8 zero points in that one.
SCALE_ORDER = [column + 8 * row for column in range(8) for row in range(8)]
ZERO_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@cache
def load(name: str) -> Path:
    """What was loaded; raises FileNotFoundError where the library is not at hand."""
    folder = Path(os.environ[FOLDER])
    vllm = find_spec("vllm")
    folders = [folder, *map(Path, (vllm and vllm.submodule_search_locations) or ())]
    for found in (path for each in folders for path in sorted(each.glob(f"**/{name}*"))):
        if found.suffix == ".so":
            return _loaded(found)
        with tempfile.TemporaryDirectory() as unpacked:  # a library that is loaded needs no file
            path = Path(unpacked) / name
            path.write_bytes(lzma.decompress(found.read_bytes()))
            return _loaded(path)
    raise FileNotFoundError(f"{name} is neither in {folder} nor in an installed vLLM")


def _loaded(path: Path) -> Path:
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    return path


@dataclass(frozen=True, slots=True)
class MarlinWeight:
    words: Tensor
    scales: Tensor  # [K / g, N], reordered
    zeros: Tensor  # int32 [K / g, N / 8], reordered
    workspace: Tensor  # locks, of which a kernel leaves zeros
    none: Tensor  # no order of the inputs
    shape: tuple[int, int]  # N, K


def marlin_weight(q: Tensor, zeros: Tensor, scales: Tensor) -> MarlinWeight:
    """q uint8 [K, N], zeros uint8 [K/g, N], scales [K/g, N]."""
    (k, n), device = q.shape, q.device
    none = torch.empty(0, dtype=torch.int32, device=device)
    rows = _join(q.view(k // NIBBLES, NIBBLES, n).transpose(1, 2))
    ordered = zeros.view(-1, len(SCALE_ORDER))[:, SCALE_ORDER].view(-1, NIBBLES)[:, ZERO_ORDER]
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return MarlinWeight(
        words=torch.ops._C.gptq_marlin_repack(rows, none, k, n, 4, False),
        scales=scales.view(-1, len(SCALE_ORDER))[:, SCALE_ORDER].view(-1, n).contiguous(),
        zeros=_join(ordered.reshape(-1, n // NIBBLES, NIBBLES)),
        workspace=torch.zeros(processors, dtype=torch.int32, device=device),
        none=none,
        shape=(n, k),
    )


def _join(nibbles: Tensor) -> Tensor:
    """[..., 8] -> int32 [...], the first one in the lowest bits."""
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32, device=nibbles.device)
    for i, part in enumerate(nibbles.unbind(-1)):
        words |= part.int() << 4 * i
    return words


def marlin_linear(x: Tensor, weight: MarlinWeight) -> Tensor:
    """As vLLM calls it for AWQ's weights: sums in float32, no atomics."""
    n, k = weight.shape
    out: Tensor = torch.ops._C.marlin_gemm(
        x, None, weight.words, None, weight.scales, None, None, weight.zeros, weight.none,
        weight.none, weight.workspace, UINT4, len(x), n, k, True, False, True, False,
    )  # fmt: skip
    return out


def flash_attention_3(
    q: Tensor, k: Tensor, v: Tensor, step: GpuStep, scale: float, plan: Tensor | None = None
) -> Tensor:
    """Causal attention of q [T, Hq, D] over paged keys and values [blocks, tokens, Hkv, D], or over
    a whole prompt's [T, Hkv, D].
    """
    starts, paged = step.query_start_loc, k.dim() == 4
    out: Tensor = torch.ops._vllm_fa3_C.fwd(
        q, k, v, None, None, None, None, starts, None if paged else starts, None, None,
        step.context_lens if paged else None, max(step.max_query_len, 1), step.max_context_len,
        step.block_tables if paged else None, None, None, None, None, None, None, None, None,
        scale, True, -1, -1, 0.0, True, plan, 0, None, 0, None, 1, 0, None,
    )[0]  # fmt: skip
    return out


def flash_attention_3_plan(q: Tensor, k: Tensor, step: GpuStep) -> Tensor:
    """How a step of one query per sequence is cut; the layers of a step share it."""
    (_, num_heads, head_dim), (_, block_size, num_kv_heads, _) = q.shape, k.shape
    plan: Tensor = torch.ops._vllm_fa3_C.get_scheduler_metadata(
        step.num_seqs, 1, step.max_context_len, num_heads, num_kv_heads, head_dim, head_dim,
        q.dtype, step.context_lens, step.query_start_loc, None, None, None, None, block_size, 0,
        True, -1, -1, False, 0, None, 0,
    )  # fmt: skip
    return plan
