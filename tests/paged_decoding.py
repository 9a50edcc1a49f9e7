"""Drive a Decoder over a paged cache without an engine: blocks are scattered on purpose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.kv_cache import KVCache
from engine.models import load_decoder, load_spec
from engine.parallel import ParallelGroup
from engine.weights.cache import WeightCache
from kernels.attention import AttentionMetadata

BLOCK_SIZE = 4
NUM_BLOCKS = 128


class PagedDecoder:
    """One sequence after another, or several side by side, through one cache."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        group: ParallelGroup | None = None,
        session_len: int | None = None,
        int8_activations: bool = False,
        cache: WeightCache | None = None,
        quant_policy: int = 0,
    ) -> None:
        group = group or ParallelGroup()
        self.spec = load_spec(path)
        self.decoder = load_decoder(
            path,
            self.spec,
            dtype=dtype,
            device="cpu",
            group=group,
            session_len=session_len,
            int8_activations=int8_activations,
            cache=cache,
        )
        self._block_size = 16 if quant_policy else BLOCK_SIZE
        self.kv_cache = KVCache.allocate(
            self.spec,
            NUM_BLOCKS,
            self._block_size,
            dtype,
            "cpu",
            group.size,
            quant_policy=quant_policy,
        )
        self._free = list(np.random.default_rng(0).permutation(NUM_BLOCKS))
        self._tables: list[list[int]] = []
        self._lengths: list[int] = []

    def add(self, max_len: int) -> int:
        """Blocks for a new sequence of at most `max_len` tokens; returns its number."""
        num_blocks = -(-max_len // self._block_size)
        self._tables.append([int(self._free.pop()) for _ in range(num_blocks)])
        self._lengths.append(0)
        return len(self._tables) - 1

    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor | None]:
        """Append tokens to sequences (number, tokens); decode rows must come first.

        Returns each one's logits [its tokens, V], or None on other ranks than 0.
        """
        counts = [len(tokens) for _, tokens in work]
        starts = [self._lengths[number] for number, _ in work]
        width = max(len(self._tables[number]) for number, _ in work)
        tables, size = np.zeros((len(work), width), dtype=np.int32), self._block_size
        slots: list[int] = []
        positions: list[int] = []
        for row, (number, tokens) in enumerate(work):
            table = self._tables[number]
            tables[row, : len(table)] = table
            for position in range(starts[row], starts[row] + len(tokens)):
                slots.append(table[position // size] * size + position % size)
                positions.append(position)
            self._lengths[number] += len(tokens)
        meta = AttentionMetadata.build(
            np.cumsum([0, *counts], dtype=np.int32),
            np.array(
                [start + count for start, count in zip(starts, counts, strict=True)], np.int32
            ),
            tables,
            np.array(slots, dtype=np.int32),
            sum(count == 1 for count in counts),
            size,
            "cpu",
        )
        input_ids = torch.tensor([token for _, tokens in work for token in tokens])
        hidden = self.decoder.forward(input_ids, torch.tensor(positions), meta, self.kv_cache)
        logits = self.decoder.logits(hidden)
        if logits is None:
            return [None] * len(work)
        return list(torch.split(logits, counts))

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> Tensor:
        """Logits [T, V] of a new sequence, computed at once or `chunk` tokens at a time."""
        number, chunk = self.add(len(token_ids)), chunk or len(token_ids)
        parts = []
        for start in range(0, len(token_ids), chunk):
            (part,) = self.step([(number, token_ids[start : start + chunk])])
            assert part is not None
            parts.append(part)
        return torch.cat(parts)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely continuation, one token per step."""
        number = self.add(len(prompt) + num_tokens)
        tokens, work = [], list(prompt)
        for _ in range(num_tokens):
            (logits,) = self.step([(number, work)])
            assert logits is not None
            work = [int(logits[-1].argmax())]
            tokens += work
        return tokens

    def replay(self, prompt: Sequence[int], output: Sequence[int]) -> Tensor | None:
        """Logits of a prompt in two chunks, then of each output token in a step of its own.

        None on other ranks than 0.
        """
        number, half = self.add(len(prompt) + len(output)), len(prompt) // 2
        works = [prompt[:half], prompt[half:], *([token] for token in output)]
        parts = [self.step([(number, work)])[0] for work in works]
        kept = [part for part in parts if part is not None]
        return torch.cat(kept) if kept else None


@dataclass(frozen=True)
class Replay:
    """A job for `replay_rank`."""

    path: Path
    dtype: torch.dtype
    prompt: list[int]
    output: list[int]
    cache: Path | None = None
    quant_policy: int = 0


def replay_rank(rank: int, address: str, out: Path, jobs: Sequence[Replay]) -> None:
    """The body of one of two spawned ranks; rank 0 saves the logits of every job."""
    torch.set_num_threads(1)
    group = ParallelGroup.join(rank, 2, address, "cpu")
    results = [_replay(job, group) for job in jobs]
    assert all((result is None) == (rank > 0) for result in results)
    if rank == 0:
        torch.save(results, out)
    group.leave()


def _replay(job: Replay, group: ParallelGroup) -> Tensor | None:
    cache = None if job.cache is None else WeightCache(job.cache, 1 << 30)
    policy = job.quant_policy
    decoder = PagedDecoder(job.path, job.dtype, group, cache=cache, quant_policy=policy)
    return decoder.replay(job.prompt, job.output)
