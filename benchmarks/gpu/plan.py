"""Problem sizes: Llama-3-8B on a GPU, miniatures of it in Triton's interpreter."""

from dataclasses import dataclass

import torch

from benchmarks.random_checkpoint import LlamaShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of all stages. Context lengths and prompts are in tokens."""

    on_gpu: bool
    dtype: torch.dtype  # of activations
    linears: dict[str, tuple[int, int]]  # N, K
    row_counts: tuple[int, ...]  # M
    num_seqs: int  # of decode attention
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_lens: tuple[int, ...]
    prompt_lens: tuple[int, ...]  # of prefill attention
    vocab_size: int
    model: LlamaShape
    streams: tuple[int, ...]
    context: int  # of the streams, in the middle of what is timed
    decode_steps: int
    stream_numel: int  # float32 elements of the bandwidth tests
    l2_numel: int
    matmul_size: int
    chain_length: int  # kernels that depend on each other

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.on_gpu else "cpu")


GPU = Plan(
    on_gpu=True,
    dtype=torch.bfloat16,
    linears={
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    row_counts=(1, 16, 32, 64, 128, 256, 1024, 4096),
    num_seqs=64,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=64,
    context_lens=(1024, 4096, 8192),
    prompt_lens=(4096, 16384),
    vocab_size=128_256,
    model=LlamaShape(
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_position_embeddings=8192,
    ),
    streams=(1, 16, 64, 256),
    context=1024,
    decode_steps=64,
    stream_numel=1 << 31,
    l2_numel=6 << 20,
    matmul_size=8192,
    chain_length=200,
)

REHEARSAL = Plan(
    on_gpu=False,
    dtype=torch.float32,
    linears={"qkv": (128, 128), "gate_up": (256, 128)},
    row_counts=(3,),
    num_seqs=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_size=64,
    context_lens=(100,),
    prompt_lens=(70,),
    vocab_size=1000,
    model=LlamaShape(
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=128,
        max_position_embeddings=256,
        group_size=64,
    ),
    streams=(2,),
    context=10,
    decode_steps=1,
    stream_numel=1 << 16,
    l2_numel=1 << 15,
    matmul_size=64,
    chain_length=5,
)
