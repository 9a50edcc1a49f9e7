"""A tiny engine's greedy tokens: transformers' in float32, however its steps are launched.

Checkpoints with int4 and with dense weights; CUDA graphs and the step ahead on and off. Quantised
keys and values change tokens: there the reference is the CPU engine, which computes in plain torch,
and one stream in four may differ, where a value lay between two levels.

In bfloat16 two tokens often have the same logit, so that only equal sums give equal tokens. Prompts
that start in one step and end in one keep every step's rows the same, however it is launched; then
the tokens of graphs are those of their steps computed eagerly at the same padding, those of a step
ahead are those in turn, and each is what it was before. Eager steps without padding cut attention
in other parts, and are compared in float32 only. transformers' first tokens, in float32, must be
those of half of the streams.

Last, torch raises an error where launching a step would wait for the GPU.
"""

import itertools
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import Prompts, generate, open_engine, random_prompts
from benchmarks.random_checkpoint import LlamaShape, write_checkpoints
from engine.cuda_graphs import DecodeGraphs
from engine.engine import Engine
from engine.weights.awq import unpack_awq
from engine.weights.matrix import Int4Matrix

SHAPE = LlamaShape(
    hidden_size=256, intermediate_size=512, num_layers=3, num_heads=4, num_kv_heads=2,
    vocab_size=1000, max_position_embeddings=1024, group_size=64,
)  # fmt: skip
PROMPT_LENS = (1, 17, 63, 64, 65, 200, 700)
SHORT_LENS = (1, 17, 30, 31, 33, 64, 70)  # all in one step
NUM_TOKENS = 40
MAX_STEP_TOKENS = 256


def run(bench: Bench) -> None:
    plan = bench.plan
    shape = SHAPE if plan.on_gpu else plan.model
    lens = PROMPT_LENS if plan.on_gpu else (1, 9)
    prompts = [random_prompts(1, length, shape.vocab_size)[0] for length in lens]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = dict(
            zip(("int4", "dense"), write_checkpoints(Path(folder), shape), strict=True)
        )
        for name, path in checkpoints.items() if plan.on_gpu else [("int4", checkpoints["int4"])]:
            expected = bench.attempt(
                f"transformers {name}", partial(_transformers, bench, path, prompts)
            )
            if expected is None:
                continue
            for graphs, ahead in _switches(plan.on_gpu, name):
                label = (
                    f"{name}, {'graphs' if graphs else 'eager'}, {'ahead' if ahead else 'in turn'}"
                )
                switches = {"enable_cuda_graphs": graphs, "enable_async_scheduling": ahead}
                bench.attempt(
                    label, partial(_compare, bench, label, path, prompts, expected, 0.0, **switches)
                )
                bench.save()
        label = "bfloat16"
        bench.attempt(label, partial(_compare_bfloat16, bench, checkpoints["int4"]))
        bench.save()
        for policy in (8, 4, 16) if plan.on_gpu else (8,):
            label = f"quant_policy {policy}"
            bench.attempt(label, partial(_compare_policy, bench, label, checkpoints["int4"],
                                         prompts, policy))  # fmt: skip
            bench.save()
        if plan.on_gpu:
            waiting = partial(_generate_without_waiting, bench, checkpoints["int4"], prompts)
            bench.attempt("launching waits for nothing", waiting)


def _switches(on_gpu: bool, name: str) -> list[tuple[bool, bool]]:
    """Of graphs and the step ahead."""
    if not on_gpu:
        return [(False, True)]
    if name == "dense":
        return [(True, True), (False, False)]
    return list(itertools.product((True, False), (True, False)))


def _num_tokens(bench: Bench) -> int:
    return NUM_TOKENS if bench.plan.on_gpu else 3


def _compare(
    bench: Bench,
    label: str,
    path: Path,
    prompts: Prompts,
    expected: Prompts,
    limit: float,
    **settings: Any,
) -> None:
    found = _generate(bench, path, prompts, "cuda", **settings)
    _check_equal(bench, label, found, expected, limit)


def _compare_bfloat16(bench: Bench, path: Path) -> None:
    lens = SHORT_LENS if bench.plan.on_gpu else (1, 9)
    vocab_size = SHAPE.vocab_size if bench.plan.on_gpu else bench.plan.model.vocab_size
    prompts = [random_prompts(1, length, vocab_size)[0] for length in lens]

    def tokens(ahead: bool) -> Prompts:
        switches = {"enable_cuda_graphs": True, "enable_async_scheduling": ahead}
        return _generate(bench, path, prompts, "cuda", "bfloat16", **switches)

    expected = tokens(ahead=True)
    with (
        patch.object(DecodeGraphs, "capture", _record_nothing),
        patch.object(DecodeGraphs, "replay", DecodeGraphs.compute_padded),
    ):
        _check_equal(bench, "bfloat16, graphs against eager", tokens(ahead=True), expected)
    if not bench.plan.on_gpu:
        return
    _check_equal(bench, "bfloat16, ahead against in turn", tokens(ahead=False), expected)
    _check_equal(bench, "bfloat16, again", tokens(ahead=True), expected)
    exact = [each[:1] for each in _transformers(bench, path, prompts)]
    first = [each[:1] for each in expected]
    _check_equal(bench, "bfloat16, first tokens against transformers", first, exact, limit=0.5)


def _record_nothing(graphs: DecodeGraphs, sizes: Sequence[int] | None = None) -> None:
    pass


def _check_equal(
    bench: Bench, label: str, found: Prompts, expected: Prompts, limit: float = 0.0
) -> None:
    """The share of streams that differ anywhere."""
    differ = sum(a != b for a, b in zip(found, expected, strict=True))
    bench.check(label, differ / len(expected), limit)


def _compare_policy(bench: Bench, label: str, path: Path, prompts: Prompts, policy: int) -> None:
    # Blocks are part of what is stored: the CPU engine takes the GPU's size.
    settings: dict[str, Any] = {"quant_policy": policy, "block_size": 64}
    expected = _generate(bench, path, prompts, "cpu", **settings)
    _compare(bench, label, path, prompts, expected, 0.25, **settings)


def _generate_without_waiting(bench: Bench, path: Path, prompts: Prompts) -> None:
    """Results are waited for by events, which this mode lets pass."""
    with _engine(path, "cuda", "bfloat16") as engine:
        torch.cuda.set_sync_debug_mode("error")
        try:
            generate(engine, prompts, _num_tokens(bench))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _generate(
    bench: Bench,
    path: Path,
    prompts: Prompts,
    device: str,
    dtype: str = "float32",
    **settings: Any,
) -> Prompts:
    with _engine(path, device, dtype, **settings) as engine:
        return generate(engine, prompts, _num_tokens(bench))


def _engine(path: Path, device: str, dtype: str, **settings: Any) -> AbstractContextManager[Engine]:
    return closing(
        open_engine(
            path, device=device, dtype=dtype, max_num_seqs=8,
            max_num_batched_tokens=MAX_STEP_TOKENS, cache_max_entry_count=64, **settings,
        )
    )  # fmt: skip


@torch.inference_mode()
def _transformers(bench: Bench, path: Path, prompts: Prompts) -> Prompts:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(path)
    config.quantization_config = None
    model = LlamaForCausalLM(config).to(bench.plan.device, torch.float32).eval()
    model.load_state_dict(_dense(path), strict=True)
    model.generation_config.eos_token_id = None
    tokens: Prompts = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt], device=bench.plan.device)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=_num_tokens(bench),
            do_sample=False,
            pad_token_id=0,
        )
        tokens.append(output[0, len(prompt) :].tolist())
    return tokens


def _dense(path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's weights in float32, dequantised where they are packed."""
    stored = load_file(path / "model.safetensors")
    weights = {}
    for name, value in stored.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight":
            weights[name] = value.float()
        elif kind == "qweight":
            q, zeros = unpack_awq(value, stored[f"{stem}.qzeros"])
            matrix = Int4Matrix(q, zeros, stored[f"{stem}.scales"])
            weights[f"{stem}.weight"] = matrix.dequantize()
    return weights
