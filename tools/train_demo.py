"""Trains the demo model from scratch on the synthetic corpus and writes a bf16 checkpoint.

Usage: python -m tools.train_demo [--steps N] [--work DIR] [--out DIR]

Every step draws its own chats from (seed, step), so a run resumed from the checkpoint in the work
directory sees the data that an unbroken one would have seen.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing import get_context
from tqdm import tqdm

from tools.demo_corpus import LAST_MIXTURE, LATE_MIXTURE, MIXTURE, sample_chat
from tools.demo_model import DemoConfig, DemoModel, rotary_table
from tools.demo_tokenizer import END_ID, PAD_ID, encode_chat, save_tokenizer, train_tokenizer
from tools.demo_words import Source
from tools.eval_demo import evaluate, format_scores

SEED = 1
WORKERS = (0, 1)
# A worker whose main process was killed gives up after this wait.
STALL_LIMIT_S = 1800
TOKENS_PER_STEP = 6144
# Small enough that two workers of unlike speed end a step together.
TOKENS_PER_MICRO_BATCH = 2048
LENGTH_MULTIPLE = 16

MUON_LR = 0.01
ADAM_LR = 3e-3
EMBEDDING_LR = 0.02
WARMUP_STEPS = 40
# The first step of each mixture.
MIXTURES = {0: MIXTURE, 700: LATE_MIXTURE, 2600: LAST_MIXTURE}
# The share of steps in which the learning rate falls linearly to zero.
DECAY_SHARE = 0.5
CHECKPOINT_EVERY = 100
EVALUATE_EVERY = 200
EVALUATE_PER_TASK = 8


class MicroBatch(NamedTuple):
    """Right-padded rows [B, T]; `positions` index the flattened rows, `targets` follow them."""

    ids: Tensor
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Shared:
    """What the workers share: weights they read, gradients each adds up, a counter of work."""

    model: DemoModel
    gradients: list[list[Tensor]]
    losses: Tensor
    next_micro: "Synchronized[int]"
    turnstile: Barrier

    @classmethod
    def create(cls, config: DemoConfig) -> "Shared":
        torch.manual_seed(SEED)
        model = DemoModel(config).to(torch.bfloat16)
        model.share_memory()
        zeros = [[_shared_zeros(p.shape) for p in model.parameters()] for _ in WORKERS]
        losses = _shared_zeros(torch.Size([len(WORKERS)]))
        context = get_context("spawn")
        turnstile = context.Barrier(len(WORKERS), timeout=STALL_LIMIT_S)
        return cls(model, zeros, losses, context.Value("i", 0), turnstile)


def _shared_zeros(shape: torch.Size) -> Tensor:
    return torch.zeros(shape).share_memory_()  # type: ignore[no-untyped-call, no-any-return]


class Worker:
    """Computes gradients of one micro-batch after the other on one thread.

    Two processes that meet once per step share busy cores far better than two threads that meet
    after every operation.
    """

    def __init__(self, rank: int, shared: Shared, tokenizer: Tokenizer) -> None:
        torch.set_num_threads(1)
        self.rank, self.shared, self.tokenizer = rank, shared, tokenizer
        self.rotary = rotary_table(shared.model.config)
        self.loss = torch.compile(shared.model.loss, dynamic=True)

    def run(self, step: int) -> None:
        """Takes micro-batches of the step until none is left; longest first, to end together."""
        shared = self.shared
        batch = draw_batch(self.tokenizer, step, shared.model.config.max_positions)
        count = sum(len(micro.targets) for micro in batch)
        while (index := self._take()) < len(batch):
            micro = batch[-1 - index]
            rotary = self.rotary[:, : micro.ids.shape[1]]
            loss = self.loss(micro.ids, rotary, micro.positions, micro.targets) / count
            torch.autograd.backward(loss)
            shared.losses[self.rank] += loss.item()
            # Micro-batches are summed in float32: bf16 would drop the small ones.
            sums = shared.gradients[self.rank]
            for parameter, total in zip(shared.model.parameters(), sums, strict=True):
                assert parameter.grad is not None
                total += parameter.grad
                parameter.grad = None

    def _take(self) -> int:
        with self.shared.next_micro.get_lock():
            index = self.shared.next_micro.value
            self.shared.next_micro.value += 1
        return index


def serve_steps(rank: int, shared: Shared, tokenizer_json: str, first: int, steps: int) -> None:
    """The life of every worker process but the main one."""
    worker = Worker(rank, shared, Tokenizer.from_str(tokenizer_json))
    for step in range(first, steps):
        shared.turnstile.wait()
        worker.run(step)
        shared.turnstile.wait()


class Optimizer:
    """The float32 weights, moved by the workers' gradients and published to the shared model."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.masters = [parameter.detach().float() for parameter in shared.model.parameters()]
        # Muon orthogonalises hidden matrices; tables and gains are not linear maps and get AdamW.
        hidden: list[Tensor] = []
        others: list[Tensor] = []
        embedding: list[Tensor] = []
        for (name, _), master in zip(shared.model.named_parameters(), self.masters, strict=True):
            is_hidden = name.startswith("layers") and master.ndim == 2
            is_embedding = name == "embed.weight"
            (hidden if is_hidden else embedding if is_embedding else others).append(master)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(
                [{"params": others, "lr": ADAM_LR}, {"params": embedding, "lr": EMBEDDING_LR}],
                betas=(0.9, 0.95),
                weight_decay=0.0,
            ),
        ]

    def step(self, scale: float) -> None:
        """One update at `scale` of the peak learning rates."""
        for master, *gradients in zip(self.masters, *self.shared.gradients, strict=True):
            master.grad = torch.stack(gradients).sum(0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
            optimizer.step()
        self._publish()

    def save(self, path: Path, step: int) -> None:
        state = {
            "step": step,
            "masters": self.masters,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> int:
        state = torch.load(path)
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._publish()
        return int(state["step"])

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in zip(self.shared.model.parameters(), self.masters, strict=True):
            parameter.copy_(master)


def draw_batch(tokenizer: Tokenizer, step: int, max_length: int) -> list[MicroBatch]:
    """Fresh chats worth about TOKENS_PER_STEP, those of like length together."""
    source = Source(Random(f"train {SEED} {step}"))
    mixture = MIXTURES[max(first for first in MIXTURES if first <= step)]
    rows: list[tuple[list[int], list[bool]]] = []
    drawn = 0
    while drawn < TOKENS_PER_STEP:
        ids, by_assistant = encode_chat(tokenizer, sample_chat(source, mixture))
        if len(ids) <= max_length:
            rows.append((ids, by_assistant))
            drawn += len(ids)
    rows.sort(key=lambda row: len(row[0]))
    return [_pad(group) for group in _group(rows)]


def _group(
    rows: list[tuple[list[int], list[bool]]],
) -> Iterator[list[tuple[list[int], list[bool]]]]:
    group: list[tuple[list[int], list[bool]]] = []
    for row in rows:
        if group and (len(group) + 1) * len(row[0]) > TOKENS_PER_MICRO_BATCH:
            yield group
            group = []
        group.append(row)
    yield group


def _pad(rows: list[tuple[list[int], list[bool]]]) -> MicroBatch:
    longest = max(len(ids) for ids, _ in rows)
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    # A batch of one row would be compiled apart, so it gets an empty companion.
    ids = torch.full((max(len(rows), 2), length), PAD_ID)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for index, (row, by_assistant) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        wanted[index, : len(row)] = torch.tensor(by_assistant)
    following = wanted.flatten().nonzero().flatten()
    return MicroBatch(ids, following - 1, ids.flatten()[following])


def learning_rate_scale(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def save_checkpoint(model: DemoModel, tokenizer: Tokenizer, directory: Path) -> None:
    """A Hugging Face checkpoint in bf16."""
    save_tokenizer(tokenizer, directory, model.config.max_positions)
    config = model.config.to_hf(PAD_ID, END_ID)
    generation = {"eos_token_id": [END_ID, PAD_ID], "pad_token_id": PAD_ID, "do_sample": False}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(model.to_hf(), directory / "model.safetensors", metadata={"format": "pt"})


def train(steps: int, work: Path, out: Path) -> None:
    config = DemoConfig()
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.pt"
    tokenizer = _tokenizer(work / "tokenizer.json")
    assert tokenizer.get_vocab_size() == config.vocab_size
    shared = Shared.create(config)
    optimizer = Optimizer(shared)
    first = optimizer.restore(checkpoint) if checkpoint.exists() else 0
    worker = Worker(WORKERS[0], shared, tokenizer)
    # Compiles alone, so that the others find the result in the compiler's cache.
    worker.run(first)
    _start_workers(shared, tokenizer, first, steps)
    progress = tqdm(range(first, steps), initial=first, total=steps, mininterval=10.0, unit="step")
    for step in progress:
        loss = _step(worker, optimizer, step, learning_rate_scale(step, steps))
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            optimizer.save(checkpoint, step + 1)
        if (step + 1) % EVALUATE_EVERY == 0:
            save_checkpoint(shared.model, tokenizer, work / "model")
            scores = format_scores(evaluate(work / "model", EVALUATE_PER_TASK))
            tqdm.write(f"step {step + 1} loss {loss:.4f}\n{scores}")
    save_checkpoint(shared.model, tokenizer, out)


def _tokenizer(path: Path) -> Tokenizer:
    """A resumed run keeps its tokenizer even if the corpus has changed meanwhile."""
    if not path.exists():
        train_tokenizer(SEED).save(str(path))
    return Tokenizer.from_file(str(path))


def _start_workers(shared: Shared, tokenizer: Tokenizer, first: int, steps: int) -> None:
    for rank in WORKERS[1:]:
        arguments = (rank, shared, tokenizer.to_str(), first, steps)
        get_context("spawn").Process(target=serve_steps, args=arguments, daemon=True).start()


def _step(worker: Worker, optimizer: Optimizer, step: int, scale: float) -> float:
    """Gradients by all workers, then one update; returns the mean loss per token."""
    shared = worker.shared
    shared.next_micro.value = 0
    shared.losses.zero_()
    for sums in shared.gradients:
        for total in sums:
            total.zero_()
    shared.turnstile.wait()
    worker.run(step)
    shared.turnstile.wait()
    optimizer.step(scale)
    return float(shared.losses.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument(
        "--work", type=Path, default=Path("local/train_demo"), help="resumable state"
    )
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    arguments = parser.parse_args()
    train(arguments.steps, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
