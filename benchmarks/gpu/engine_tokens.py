"""A tiny engine's greedy tokens: transformers' in float32, however its steps are launched.

Checkpoints with int4 and with dense weights; CUDA graphs and the step ahead on and off. Quantised
keys and values change tokens: there the reference is the CPU engine, which computes in plain torch,
and one stream in four may differ, where a value lay between two levels.
"""

import itertools
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import Prompts, generate, open_engine, random_prompts
from benchmarks.random_checkpoint import LlamaShape, write_checkpoints
from engine.weights.awq import dequantize, unpack_awq

SHAPE = LlamaShape(
    hidden_size=256, intermediate_size=512, num_layers=3, num_heads=4, num_kv_heads=2,
    vocab_size=1000, max_position_embeddings=1024, group_size=64,
)  # fmt: skip
PROMPT_LENS = (1, 17, 63, 64, 65, 200, 700)
NUM_TOKENS = 40


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
            for graphs, ahead in itertools.product((True, False), repeat=2):
                if not plan.on_gpu and (graphs or not ahead):
                    continue
                label = (
                    f"{name}, {'graphs' if graphs else 'eager'}, {'ahead' if ahead else 'in turn'}"
                )
                switches = {"enable_cuda_graphs": graphs, "enable_async_scheduling": ahead}
                bench.attempt(
                    label, partial(_compare, bench, label, path, prompts, expected, 0.0, **switches)
                )
                bench.save()
        for policy in (8, 4, 16) if plan.on_gpu else (8,):
            label = f"quant_policy {policy}"
            bench.attempt(label, partial(_compare_policy, bench, label, checkpoints["int4"],
                                         prompts, policy))  # fmt: skip
            bench.save()


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
    """The share of streams that differ anywhere."""
    found = _generate(bench, path, prompts, "cuda", **settings)
    differ = sum(a != b for a, b in zip(found, expected, strict=True))
    bench.check(label, differ / len(prompts), limit)


def _compare_policy(bench: Bench, label: str, path: Path, prompts: Prompts, policy: int) -> None:
    # Blocks are part of what is stored: the CPU engine takes the GPU's size.
    settings = {"quant_policy": policy, "block_size": 64}
    expected = _generate(bench, path, prompts, "cpu", **settings)
    _compare(bench, label, path, prompts, expected, 0.25, **settings)


def _generate(bench: Bench, path: Path, prompts: Prompts, device: str, **settings: Any) -> Prompts:
    engine = open_engine(
        path, device=device, dtype="float32", max_num_seqs=8, max_num_batched_tokens=256,
        cache_max_entry_count=64, **settings,
    )  # fmt: skip
    try:
        return generate(engine, prompts, _num_tokens(bench))
    finally:
        engine.close()


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
            weight = dequantize(q, zeros, stored[f"{stem}.scales"])
            weights[f"{stem}.weight"] = weight.t().contiguous()
    return weights
