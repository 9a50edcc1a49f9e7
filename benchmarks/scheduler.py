"""Host cost of one engine step: schedule, build, update, with nothing computed in between.

    python -m benchmarks.scheduler

On a GPU this is the time a step may hide behind the previous one; above it, tokens wait for Python.
"""

import statistics
import time

from benchmarks.record import Table, save, show
from benchmarks.stub_executor import StubExecutor
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import EngineInfo
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest

NUM_SEQS = (1, 64, 256)
PROMPT_TOKENS = 512
NUM_STEPS = 400
GOAL_MS = 1.0
INFO = EngineInfo(
    vocab_size=32000,
    session_len=4096,
    num_blocks=65536,
    block_size=16,
    dtype="bfloat16",
    device="cpu",
    tp=1,
)


def main() -> None:
    rows: list[list[str | float]] = [[num_seqs, *_step_ms(num_seqs)] for num_seqs in NUM_SEQS]
    table = Table(
        title="Host cost of a decode step, stub executor",
        columns=["running sequences", "p50 ms", "p99 ms"],
        rows=rows,
        notes=[
            f"{NUM_STEPS} steps with nobody joining or leaving, prompts of {PROMPT_TOKENS} tokens. "
            f"**Goal: at most {GOAL_MS:g} ms at 256 sequences.**"
        ],
    )
    show(table)
    print(save("scheduler", "Scheduler", [table]))


def _step_ms(num_seqs: int) -> tuple[float, float]:
    config = EngineConfig(model="stub", max_num_batched_tokens=8192)
    engine = Engine(config, StubExecutor(INFO))
    for index in range(num_seqs):
        prompt = [(index * 7919 + i) % INFO.vocab_size for i in range(PROMPT_TOKENS)]
        params = SamplingParams(ignore_eos=True)
        engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
    while len(engine.step()) < num_seqs:
        pass
    times = []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        outputs = engine.step()
        times.append((time.perf_counter() - started) * 1000)
        assert len(outputs) == num_seqs, "every sequence advances in every step"
    quantiles = statistics.quantiles(times, n=100)
    return quantiles[49], quantiles[98]


if __name__ == "__main__":
    main()
