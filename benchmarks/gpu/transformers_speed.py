"""transformers on the same Llama-3-8B in bf16: generate for one stream, generate_batch for 64.

Without flash-attn its continuous batching attends through PyTorch's SDPA.
"""

import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import random_prompts
from benchmarks.random_checkpoint import model_config

BATCH = 64
NUM_TOKENS = 33


@torch.inference_mode(False)
@torch.no_grad()
def run(bench: Bench) -> None:
    """Without inference mode, which generate_batch's thread is not in: what is made there and used
    here, or the other way, must be tensors of one kind.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    plan = bench.plan
    config = LlamaConfig(**model_config(plan.model, int4=False))
    config.attn_implementation = "sdpa"
    with torch.device(plan.device):
        torch.set_default_dtype(plan.dtype)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    bench.attempt("generate", partial(_generate, bench, model))
    bench.save()
    if plan.on_gpu:  # on a CPU its manager takes a minute to stop
        bench.attempt("generate_batch", partial(_generate_batch, bench, model))


def _generate(bench: Bench, model: Any) -> None:
    plan = bench.plan
    few, many = 1, NUM_TOKENS if plan.on_gpu else 2

    def seconds(num_tokens: int) -> float:
        input_ids = torch.tensor(
            random_prompts(1, plan.context, plan.model.vocab_size), device=plan.device
        )
        started = time.perf_counter()
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - started

    seconds(many)
    prompt = min(seconds(few) for _ in range(3))
    step = (min(seconds(many) for _ in range(2)) - prompt) / (many - few)
    bench.section["generate"] = {
        "ttft_ms": prompt * 1e3,
        "tokens_per_s": 1 / step,
    }


def _generate_batch(bench: Bench, model: Any) -> None:
    from transformers import GenerationConfig

    plan = bench.plan

    def seconds(num_tokens: int) -> float:
        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        prompts = random_prompts(BATCH, plan.context, plan.model.vocab_size)
        started = time.perf_counter()
        outputs = model.generate_batch(prompts, config, progress_bar=False)
        elapsed = time.perf_counter() - started
        assert len(outputs) == BATCH
        return elapsed

    prompt = seconds(1)
    step = (seconds(NUM_TOKENS) - prompt) / (NUM_TOKENS - 1)
    bench.section["generate_batch"] = {"streams": BATCH, "tokens_per_s": BATCH / step}
