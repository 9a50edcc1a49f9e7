"""Engines of a GPU in the interpreter, what they are asked, and the ranks of one that has two.

Imports little: every process that is spawned imports it.
"""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from engine.config import EngineConfig
from engine.engine import Engine
from engine.local_executor import LocalExecutor, follow
from engine.outputs import SequenceOutput
from engine.parallel import ParallelGroup
from engine.pipeline import PipelineExecutor, follow_stage
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from engine.worker import make_worker

VOCAB = 131
BLOCK_SIZE = 16
NUM_TOKENS = 4
LENGTHS = (1, 5, 14, 15)


@cache
def prompts() -> list[list[int]]:
    """The last two begin with the same block."""
    rng = random.Random(3)
    stem = [rng.randrange(VOCAB) for _ in range(BLOCK_SIZE)]
    own = [[rng.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]
    return [*own, [*stem, 5], [*stem, 9, 8]]


def settings(path: Path, **changes: object) -> EngineConfig:
    values = {
        "model": str(path),
        "device": "cuda",
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 12,
        "cache_max_entry_count": 12,
        "session_len": 32,
    }
    return EngineConfig.from_dict(values | changes)


def make_engine(path: Path, **changes: object) -> Engine:
    config = settings(path, **changes)
    return Engine(config, LocalExecutor(config))


def generate(engine: Engine, chosen: Sequence[int], **params: object) -> dict[int, SequenceOutput]:
    """What the engine makes of these prompts, all at once."""
    asked = {"temperature": 0.0, "max_tokens": NUM_TOKENS} | params
    for index in chosen:
        engine.add(
            EngineRequest(
                request_id=str(index),
                prompt_token_ids=prompts()[index],
                params=SamplingParams(**asked),  # type: ignore[arg-type]
            )
        )
    outputs: dict[str, SequenceOutput] = {}
    while engine.has_work:
        for output in engine.step():
            earlier = outputs.setdefault(output.request_id, output)
            if earlier is not output:
                earlier.merge(output)
    engine.scheduler.check_integrity()
    assert engine.scheduler.block_manager.num_free_blocks == engine.info.num_blocks
    return {index: outputs[str(index)] for index in chosen}


def run_rank(rank: int, jobs: list[tuple[int, int, str]], path: Path, out: Path) -> None:
    """The body of one of two spawned ranks; a job is tp, pp and where they meet.

    Rank 0 writes a line for each job: the tokens of two prompts.
    """
    lines = []
    for tp, pp, address in jobs:
        group = ParallelGroup.join(rank, tp, address, "cpu", pp=pp)
        config = settings(path, tp=tp, pp=pp)
        if rank > 0 and pp == 1:
            follow(make_worker(config, group), group)
        elif rank > 0:
            follow_stage(config, make_worker(config, group), group)
        else:
            executor = LocalExecutor if pp == 1 else PipelineExecutor
            engine = Engine(config, executor(config, group))
            outputs = generate(engine, (0, 1))
            engine.close()
            lines.append(repr([output.token_ids for output in outputs.values()]))
    if rank == 0:
        out.write_text("\n".join(lines))
