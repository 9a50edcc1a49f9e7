"""The ranks of a pipeline in spawned processes, and what their engine is asked to do.

Imports little: every process that is spawned imports it.
"""

import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.outputs import EngineStats, SequenceOutput
from engine.parallel import ParallelGroup
from engine.pipeline import PipelineExecutor, follow_stage
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from engine.worker import Worker

Outputs = dict[str, SequenceOutput]


@dataclass(frozen=True)
class Job:
    """An engine of pp stages of tp ranks, which meet at `address`."""

    tp: int
    pp: int
    path: Path
    address: str

    def config(self, cache: Path | None, **changes: Any) -> EngineConfig:
        return EngineConfig(
            model=str(self.path),
            dtype="float32",
            device="cpu",
            num_threads=1,
            block_size=4,
            max_num_seqs=6,
            max_num_batched_tokens=16,
            cache_max_entry_count=28,
            weights_cache=None if cache is None else str(cache),
            **({"tp": self.tp, "pp": self.pp} | changes),
        )


def everything(engine: Engine, prompts: list[list[int]]) -> tuple[Outputs, EngineStats]:
    """All kinds of requests that come, go and fight for 28 blocks; the last ones know prefixes."""
    rng = random.Random(11)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.8, "seed": 4, "repetition_penalty": 1.4, "presence_penalty": 0.5},
        {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.7, "top_k": 20, "logprobs": 0},
        {"min_tokens": 8, "stop_token_ids": list(range(60))},
    ]
    outputs: Outputs = {}
    for index in range(24):
        prompt = prompts[index % len(prompts)]
        params = {"max_tokens": 10} | kinds[index % len(kinds)]
        engine.add(_request(str(index), prompt, **params))
        if index % 5 == 4:
            engine.add(_request(f"aborted {index}", prompt, temperature=1.0))
        while engine.has_work and rng.random() < 0.6:
            _collect(engine.step(), outputs)
        if index % 5 == 4:
            engine.abort(f"aborted {index}")
    while engine.has_work:
        _collect(engine.step(), outputs)
        engine.scheduler.check_integrity()
    return {name: out for name, out in outputs.items() if "ab" not in name}, engine.stats()


def _request(name: str, prompt: list[int], **params: Any) -> EngineRequest:
    settings = {"temperature": 0.0} | params
    return EngineRequest(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(**settings)
    )


def _collect(new: list[SequenceOutput], outputs: Outputs) -> None:
    for output in new:
        earlier = outputs.setdefault(output.request_id, output)
        if earlier is not output:
            earlier.merge(output)


def run_rank(rank: int, jobs: list[Job], prompts: list[list[int]], cache: Path, out: Path) -> None:
    """The body of each spawned process; rank 0 writes what `everything` gave in each job."""
    torch.set_num_threads(1)
    results = []
    for job in jobs:
        if rank >= job.tp * job.pp:
            continue
        group = ParallelGroup.join(rank, job.tp, job.address, "cpu", pp=job.pp)
        config = job.config(cache)
        if rank > 0:
            follow_stage(config, Worker(config, group), group)
            continue
        engine = Engine(config, PipelineExecutor(config, group))
        results.append((engine.info, *everything(engine, prompts)))
        engine.add(_request("in flight", prompts[0], max_tokens=8))
        engine.add(_request("too", prompts[1], max_tokens=8))
        engine.step()
        engine.close()
    if rank == 0:
        out.write_bytes(pickle.dumps(results))
