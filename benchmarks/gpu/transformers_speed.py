"""transformers on the same Llama-3-8B in bf16: generate for one stream, generate_batch for 64.

Without flash-attn its continuous batching attends through PyTorch's SDPA.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import random_prompts
from benchmarks.random_checkpoint import model_config

BATCH = 64
NUM_TOKENS = 33
# generate_batch computes prompts of 64 Ki tokens in 16 steps and more; the first stream decodes on.
NUM_BATCH_TOKENS, MAX_BATCH_TOKENS = 49, 4096
NUM_BLOCKS = 512  # of 256 tokens, twice what the streams need


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
    bench.peer("generate", partial(_generate, bench, model))
    bench.save()
    if plan.on_gpu:  # what its buffers take, too, is sized for one
        bench.peer("generate_batch", partial(_generate_batch, bench, model))


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
    """Tokens per second while all streams decode: from the last one's first token to the first
    one's last.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    plan = bench.plan
    config = GenerationConfig(
        max_new_tokens=NUM_BATCH_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # Its own choice takes all memory for keys, and for masks of as many columns.
    batching = ContinuousBatchingConfig(num_blocks=NUM_BLOCKS, max_batch_tokens=MAX_BATCH_TOKENS)
    prompts = random_prompts(BATCH, plan.context, plan.model.vocab_size)
    started = time.perf_counter()
    outputs = model.generate_batch(
        prompts, config, continuous_batching_config=batching, record_timestamps=True
    )
    elapsed = time.perf_counter() - started
    stamps = [output.timestamps for output in outputs.values()]
    assert len(stamps) == BATCH, f"{BATCH - len(stamps)} streams failed"
    bench.section["generate_batch"] = {
        "streams": BATCH,
        "tokens_per_s": shared_rate(stamps),
        "seconds": elapsed,
    }


def shared_rate(stamps: Sequence[Sequence[float]]) -> float:
    """Tokens per second, by their seconds, of the time in which every stream has a token and none
    its last.
    """
    start, end = max(each[0] for each in stamps), min(each[-1] for each in stamps)
    assert end > start, "no time in which all streams decode"
    return sum(start < stamp <= end for each in stamps for stamp in each) / (end - start)
