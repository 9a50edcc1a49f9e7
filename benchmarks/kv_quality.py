"""What each quant_policy costs in quality: next-token distributions against a plain KV cache.

    python -m benchmarks.kv_quality [--per-task N]

The demo model in float32 over held-out chats of its corpus: each chat is one prefill, whose
queries read the cache's quantised keys and values. Counted is what the model says before every
token of the assistant's answers.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.record import Table, save, show
from engine.kv_cache import KVCache, bytes_per_block
from engine.models import Decoder, load_decoder, load_spec
from engine.models.spec import DecoderSpec
from engine.parallel import ParallelGroup
from engine.quantize.comparison import Comparison
from kernels.attention import AttentionMetadata
from tools.demo_corpus import TASKS, held_out_chat
from tools.demo_tokenizer import encode_chat

MODEL = Path(__file__).parents[1] / "models" / "demo-awq"
POLICIES = {0: "plain", 8: "8 bits", 16: "fp8", 4: "4 bits"}
BLOCK_SIZE = 16


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quantised KV caches with a plain one.")
    parser.add_argument("--per-task", type=int, default=20)
    arguments = parser.parse_args()
    spec = load_spec(MODEL)
    chats = encode_chats(arguments.per_task, spec.max_position_embeddings)
    decoder = load_decoder(MODEL, spec, dtype=torch.float32, device="cpu", group=ParallelGroup())
    table = Table(
        title="Next-token distributions of the demo model",
        columns=["quant_policy", "cache", "bytes per token", "KL, nats", "99th percentile",
                 "same top token", "perplexity"],
        rows=rows_of(spec, decoder, chats),
        notes=[
            f"{sum(len(ids) for ids, _ in chats):,} tokens of {len(chats)} held-out chats, of them "
            f"{sum(int(answer.sum()) for _, answer in chats):,} of answers. KL of the plain "
            "cache's distribution to the quantised one's, mean over the answers' tokens. Computed "
            "in float32, bytes without quantisation are bf16's. Heads of 32 values; in larger "
            "ones more values share a scale."
        ],
    )  # fmt: skip
    show(table)
    print(save("kv_quality", "Quality of quantised KV caches", [table]))


Chats = list[tuple[list[int], Tensor]]


def encode_chats(per_task: int, max_tokens: int) -> Chats:
    """Token ids of each chat's beginning, and which of them are the assistant's."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    chats = (held_out_chat(task, index) for task in TASKS for index in range(per_task))
    encoded = (encode_chat(tokenizer, chat) for chat in chats)
    return [(ids[:max_tokens], torch.tensor(answer[:max_tokens])) for ids, answer in encoded]


def rows_of(spec: DecoderSpec, decoder: Decoder, chats: Chats) -> list[list[str | float]]:
    """A policy's row: means over the tokens of all answers."""
    longest = max(len(ids) for ids, _ in chats)
    scorers = {policy: scorer(spec, decoder, policy, longest) for policy in POLICIES}
    comparisons = {policy: Comparison(str(MODEL)) for policy in POLICIES}
    for ids, answer in chats:
        before = answer[1:].nonzero().squeeze(1)  # the rows that predict an answer's tokens
        targets = torch.tensor(ids[1:])[before]
        plain = scorers[0](ids)[before]
        for policy, score in scorers.items():
            found = plain if policy == 0 else score(ids)[before]
            comparisons[policy].add(found, targets, plain)
    found_of = {policy: each.evaluation() for policy, each in comparisons.items()}
    return [
        [
            str(policy),
            name,
            str(bytes_per_block(spec, 1, torch.bfloat16, 1, quant_policy=policy)),
            f"{found_of[policy].kl_mean:.2g}",
            f"{found_of[policy].kl_p99:.2g}",
            f"{found_of[policy].top1_agreement:.2%}".replace("%", " %"),
            f"{found_of[policy].perplexity:.4f}",
        ]
        for policy, name in POLICIES.items()
    ]


def scorer(
    spec: DecoderSpec, decoder: Decoder, policy: int, longest: int
) -> Callable[[list[int]], Tensor]:
    """Token ids [T] -> logits [T, V] of what follows each."""
    num_blocks = -(-longest // BLOCK_SIZE)
    cache = KVCache.allocate(
        spec, num_blocks, BLOCK_SIZE, torch.float32, "cpu", 1, quant_policy=policy
    )

    def score(ids: list[int]) -> Tensor:
        length = len(ids)
        meta = AttentionMetadata.build(
            query_start_loc=np.array([0, length], dtype=np.int32),
            context_lens=np.array([length], dtype=np.int32),
            block_tables=np.arange(num_blocks, dtype=np.int32)[None],
            slot_mapping=np.arange(length, dtype=np.int32),
            num_decodes=0,
            block_size=BLOCK_SIZE,
            device="cpu",
        )
        hidden = decoder.forward(torch.tensor(ids), torch.arange(length), meta, cache)
        logits = decoder.logits(hidden)
        assert logits is not None
        return logits

    return score


if __name__ == "__main__":
    main()
