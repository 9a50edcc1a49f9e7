"""What two ranks make of one machine's cores: tp=2, and pp=2 with one and two batches in flight.

    python -m benchmarks.parallel [--quick]

The ranks are processes with half of the cores each, over gloo on loopback; the model is random.
Between machines the network is slower and the cores are more: here only the shapes mean something,
above all whether the stages of a pipeline work at the same time.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from benchmarks.random_checkpoint import LlamaShape, write_awq
from benchmarks.record import Table, save, show
from engine.config import EngineConfig
from engine.engine import Engine
from engine.local_executor import LocalExecutor, follow
from engine.parallel import ParallelGroup, listen
from engine.pipeline import PipelineExecutor, follow_stage
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from engine.worker import Worker

STREAMS = (1, 8, 32)
PROMPT_TOKENS = 64
NUM_TOKENS = 32
ROUNDS = 5
CACHE_BLOCKS = 1024


@dataclass(frozen=True)
class Job:
    """One engine; `num_in_flight` below pp keeps stages waiting for each other."""

    name: str
    tp: int = 1
    pp: int = 1
    num_in_flight: int = 1


JOBS = (
    Job("one rank, all cores"),
    Job("tp=2", tp=2),
    Job("pp=2, one batch in flight", pp=2),
    Job("pp=2, two batches in flight", pp=2, num_in_flight=2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 layers and one round: a try")
    quick = parser.parse_args().quick
    shape = LlamaShape(num_layers=4, vocab_size=4096) if quick else LlamaShape()
    cores = len(os.sched_getaffinity(0))
    rows: list[list[str | float]] = []
    with tempfile.TemporaryDirectory(prefix="manta-bench-") as directory:
        path = write_awq(Path(directory) / "model", shape)
        for job in JOBS:
            with listen("127.0.0.1") as free:
                address = f"127.0.0.1:{free.getsockname()[1]}"
            num_ranks, out = job.tp * job.pp, Path(directory) / "out"
            arguments = (
                job,
                path,
                address,
                max(1, cores // num_ranks),
                1 if quick else ROUNDS,
                out,
            )
            spawn(_run_rank, arguments, nprocs=num_ranks)  # type: ignore[no-untyped-call]
            rows.append([job.name, *json.loads(out.read_text())])
    table = Table(
        title="Tokens per second of two ranks on one machine",
        columns=["ranks", *(f"{streams} streams" for streams in STREAMS)],
        rows=rows,
        notes=[
            f"Hidden {shape.hidden_size}, {shape.num_layers} layers, vocabulary "
            f"{shape.vocab_size}, int4; {cores} cores; prompts of {PROMPT_TOKENS} tokens, "
            f"{NUM_TOKENS} more each, prefill included; medians of {1 if quick else ROUNDS}."
        ],
    )
    show(table)
    if not quick:
        print(save("parallel", "Tensor and pipeline parallel", [table]))


def _run_rank(
    rank: int, job: Job, path: Path, address: str, num_threads: int, rounds: int, out: Path
) -> None:
    torch.set_num_threads(num_threads)
    group = ParallelGroup.join(rank, job.tp, address, "cpu", pp=job.pp)
    config = EngineConfig(
        model=str(path),
        device="cpu",
        dtype="bfloat16",
        num_threads=num_threads,
        cache_max_entry_count=CACHE_BLOCKS,
        enable_prefix_caching=False,
        weights_cache=str(path.parent / "packed"),
        tp=job.tp,
        pp=job.pp,
    )
    if rank > 0:
        worker = Worker(config, group)
        if job.pp == 1:
            follow(worker, group)
        else:
            follow_stage(config, worker, group)
        return
    make = LocalExecutor if job.pp == 1 else PipelineExecutor
    executor = make(config, group)
    executor.info = replace(executor.info, pp=job.num_in_flight)
    engine = Engine(config, executor)
    _tokens_per_second(engine, STREAMS[0])  # warm
    result = [
        statistics.median(_tokens_per_second(engine, streams) for _ in range(rounds))
        for streams in STREAMS
    ]
    engine.close()
    out.write_text(json.dumps(result))


def _tokens_per_second(engine: Engine, num_streams: int) -> float:
    rng = random.Random(num_streams)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for index in range(num_streams):
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(PROMPT_TOKENS)]
        engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
    started, num_tokens = time.perf_counter(), 0
    while engine.has_work:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    assert num_tokens == num_streams * NUM_TOKENS
    return num_tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
