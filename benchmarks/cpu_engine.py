"""The CPU engine against transformers' generate, on one random model, paired in one run.

    python -m benchmarks.cpu_engine [--quick] [--pairs 3] [--threads N] [--directory DIR]

Both compute the same 350M Llama: transformers from the bf16 twin, Manta from the AWQ checkpoint.
Each engine lives in a process of its own and only one works at a time, in turns, on the same new
prompts. A run to 1 token is prefill; a run to 33 tokens less that is 32 decode steps.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.random_checkpoint import LlamaShape, write_checkpoints
from benchmarks.record import Table, save, show

PROMPT_TOKENS = 128
DECODE_STEPS = 32
# What the longest run needs and not more, so that the first turn touches every page of the cache:
# a page's first use costs a fault, which a server pays once and a short benchmark every time.
CACHE_BLOCKS = 384
STREAMS = (1, 8, 32)
QUICK_SHAPE = LlamaShape(
    hidden_size=256, intermediate_size=768, num_layers=4, num_heads=4, num_kv_heads=2,
    vocab_size=4096,
)  # fmt: skip
BASELINE = "transformers bf16"
ENGINES = (BASELINE, "manta int4", "manta int4, int8 activations")
GOALS = (
    "**Goals for decode: int4 ≥ 4.5x at 1 stream, ≥ 2.7x at 8, ≥ 3x at 32; "
    "with int8 activations ≥ 5x at 32. For prefill: ≥ 1x.**"
)

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Prompts]


@dataclass(frozen=True, slots=True)
class Run:
    """One engine's turn at one number of streams."""

    prefill: float  # seconds
    step: float
    first_tokens: list[int]


def main() -> None:
    arguments = _arguments()
    shape = QUICK_SHAPE if arguments.quick else LlamaShape()
    pairs = 1 if arguments.quick else arguments.pairs
    with tempfile.TemporaryDirectory() as scratch:
        awq, bf16 = write_checkpoints(arguments.directory or Path(scratch), shape)
        paths = dict(zip(ENGINES, (bf16, awq, awq), strict=True))
        runs = _measure(paths, arguments.threads, pairs, shape.vocab_size)
    tables = [_table(runs, "step", "Decode, ms per step"), _table(runs, "prefill", "Prefill, ms")]
    tables[0].notes.extend(_notes(runs, shape, pairs, arguments.threads))
    for table in tables:
        show(table)
    if not arguments.quick:
        print(save("cpu_engine", "CPU engine", tables))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the CPU engine with transformers.")
    parser.add_argument("--quick", action="store_true", help="a tiny model once, nothing saved")
    parser.add_argument("--pairs", type=int, default=3, help="turns of each engine")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--directory", type=Path, help="where to write the checkpoints and keep them"
    )
    return parser.parse_args()


def _measure(
    paths: dict[str, Path], threads: int, pairs: int, vocab_size: int
) -> dict[int, dict[str, list[Run]]]:
    """Runs by streams and engine; run i of every engine had the same prompts."""
    draw = random.Random(0)
    runs: dict[int, dict[str, list[Run]]] = {n: {name: [] for name in paths} for n in STREAMS}
    with _processes(paths, threads) as engines:
        for num_streams in STREAMS:
            for turn in range(pairs + 1):
                prompts = [
                    [draw.randrange(3, vocab_size) for _ in range(PROMPT_TOKENS)]
                    for _ in range(2 * num_streams)
                ]
                for name, engine in engines.items():
                    run = _turn(engine, prompts[:num_streams], prompts[num_streams:])
                    if turn:  # the first warms caches and allocators
                        runs[num_streams][name].append(run)
                        print(f"{num_streams} streams, {name}: prefill {run.prefill * 1e3:.0f} ms, "
                              f"step {run.step * 1e3:.1f} ms", flush=True)  # fmt: skip
    return runs


def _turn(engine: Connection, short: Prompts, long: Prompts) -> Run:
    """Different prompts for both runs: Manta would find the first one's blocks in its cache."""
    engine.send((short, 1))
    prefill, tokens = engine.recv()
    engine.send((long, 1 + DECODE_STEPS))
    whole, _ = engine.recv()
    return Run(prefill, (whole - prefill) / DECODE_STEPS, [each[0] for each in tokens])


@contextmanager
def _processes(paths: dict[str, Path], threads: int) -> Iterator[dict[str, Connection]]:
    """A loaded process per engine, at rest until it is sent (prompts, number of tokens)."""
    context = multiprocessing.get_context("spawn")
    started = []
    connections = {}
    try:
        for name, path in paths.items():
            connections[name], theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, name, path, threads), daemon=True
            )
            process.start()
            started.append(process)
            connections[name].recv()
        yield connections
    finally:
        for process in started:
            process.terminate()


def _serve(connection: Connection, name: str, path: Path, threads: int) -> None:
    if name == BASELINE:
        generate = _transformers(path, threads)
    else:
        generate = _manta(path, threads, int8_activations="int8" in name)
    connection.send("ready")
    while True:
        prompts, num_tokens = connection.recv()
        started = time.perf_counter()
        tokens = generate(prompts, num_tokens)
        connection.send((time.perf_counter() - started, tokens))


def _transformers(path: Path, threads: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # every stream runs to its last token

    @torch.inference_mode()
    def generate(prompts: Prompts, num_tokens: int) -> Prompts:
        input_ids = torch.tensor(prompts)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: Prompts = output[:, PROMPT_TOKENS:].tolist()
        return tokens

    return generate


def _manta(path: Path, threads: int, int8_activations: bool) -> Generate:
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.local_executor import LocalExecutor
    from engine.sampling_params import SamplingParams
    from engine.sequence import EngineRequest

    config = EngineConfig(
        model=str(path),
        device="cpu",
        dtype="bfloat16",
        num_threads=threads,
        int8_activations=int8_activations,
        cache_max_entry_count=CACHE_BLOCKS,
        weights_cache=str(path.parent / "packed"),
    )
    engine = Engine(config, LocalExecutor(config))

    def generate(prompts: Prompts, num_tokens: int) -> Prompts:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        tokens: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            tokens[str(index)] = []
            engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
        assert all(len(each) == num_tokens for each in tokens.values())
        return list(tokens.values())

    return generate


def _table(runs: dict[int, dict[str, list[Run]]], field: str, title: str) -> Table:
    """Medians, and the median over pairs of how many times faster than transformers."""
    rows: list[list[str | float]] = []
    for num_streams, by_engine in runs.items():
        times = {name: [getattr(run, field) for run in each] for name, each in by_engine.items()}
        row: list[str | float] = [num_streams]
        for name, seconds in times.items():
            row.append(statistics.median(seconds) * 1e3)
            if name != BASELINE:
                pairs = zip(times[BASELINE], seconds, strict=True)
                row.append(f"{statistics.median(a / b for a, b in pairs):.2f}x")
        rows.append(row)
    columns = ["streams", BASELINE]
    for name in ENGINES[1:]:
        columns += [name, "faster"]
    return Table(title=title, columns=columns, rows=rows)


def _notes(
    runs: dict[int, dict[str, list[Run]]], shape: LlamaShape, pairs: int, threads: int
) -> list[str]:
    most = max(runs)
    expected = [token for run in runs[most][BASELINE] for token in run.first_tokens]
    agreement = []
    for name in ENGINES[1:]:
        found = [token for run in runs[most][name] for token in run.first_tokens]
        equal = sum(a == b for a, b in zip(expected, found, strict=True))
        agreement.append(f"{name} {equal / len(expected):.0%}")
    return [
        f"Hidden {shape.hidden_size}, {shape.num_layers} layers, {shape.num_heads} heads on "
        f"{shape.num_kv_heads}, MLP {shape.intermediate_size}, vocabulary {shape.vocab_size}, "
        f"groups of {shape.group_size}; prompts of {PROMPT_TOKENS} tokens, {DECODE_STEPS} steps, "
        f"{threads} threads, medians of {pairs} turns. {GOALS}",
        f"First tokens equal to {BASELINE}'s at {most} streams, weights and prompts being noise: "
        f"{', '.join(agreement)}.",
    ]


if __name__ == "__main__":
    main()
