"""The sampler beside one made of torch.sort, and what it draws against what it should draw.

Greedy tokens are the largest logits; tokens under top-k and top-p lie in the sets that a sort in
float64 gives; tokens of a small vocabulary come as often as softmax says; logits are edited as the
CPU's sampler edits them.
"""

from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, worst_row_error
from engine.batch import NewRow, SamplingBatch
from engine.gpu_sampler import GpuSampler
from engine.logit_edits import LogitEdits
from engine.sampling_params import SamplingParams
from kernels.gpu.sampling import sample

NUM_ROWS = 64
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9
FEW_TOKENS = 16  # of the vocabulary whose frequencies are counted
MODES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=TEMPERATURE),
    "top-k top-p": SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P),
    "top-p": SamplingParams(temperature=TEMPERATURE, top_p=TOP_P),
    "penalties": SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, repetition_penalty=1.1),
}


# Whatever edits logits; a small vocabulary holds these tokens.
EDITED = SamplingParams(
    temperature=TEMPERATURE, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.25,
    logit_bias={5: 2.0, 6: -1.0}, bad_words=[[7], [5, 8]], allowed_token_ids=list(range(1, 15)),
)  # fmt: skip
PROMPT = [1, 2, 3]


class CpuEdits:
    """The CPU sampler's edits of rows of one kind."""

    def __init__(self, params: SamplingParams, num_rows: int, vocab_size: int) -> None:
        self._edits = LogitEdits(vocab_size, num_rows, 4096, "cpu")
        for row in range(num_rows):
            self._edits.admit(NewRow(row, params, 0, (), PROMPT, []))
        self._edits.select(np.arange(num_rows))
        self._num_outputs = np.zeros(num_rows, dtype=np.int64)

    def edit(self, logits: Tensor) -> Tensor:
        edited = logits.float().clone()
        self._edits.apply(edited, self._num_outputs)
        return edited

    def append(self, tokens: Tensor) -> None:
        self._edits.append(tokens, self._num_outputs)
        self._num_outputs += 1


class Rows:
    """Rows of one kind in the sampler's table, and their steps."""

    def __init__(
        self, params: SamplingParams, num_rows: int, vocab_size: int, device: torch.device
    ) -> None:
        self._sampler = GpuSampler(vocab_size, num_rows, 4096, device)
        self._rows = np.arange(num_rows, dtype=np.int32)
        self._new = [NewRow(row, params, 1000 + row, (), PROMPT, []) for row in range(num_rows)]
        self._pool = torch.zeros(num_rows, dtype=torch.int32, device=device)

    def launch(self, logits: Tensor) -> "partial[Tensor]":
        pending = self._sampler.launch(logits, SamplingBatch(self._new, self._rows), self._pool)
        self._new = []
        return partial(lambda: torch.from_numpy(pending.get().token_ids.copy()).long())


def run(bench: Bench) -> None:
    plan = bench.plan
    bench.warm_up()
    num_rows = NUM_ROWS if plan.on_gpu else 3
    shape = (num_rows, plan.vocab_size)
    logits = 3 * torch.randn(shape, device=plan.device, dtype=plan.dtype)
    times = bench.section["us"] = {}
    for name, params in MODES.items():
        rows = Rows(params, num_rows, plan.vocab_size, plan.device)
        tokens = bench.attempt(name, lambda rows=rows: rows.launch(logits)())  # type: ignore[misc]
        if tokens is None:
            continue
        _check(bench, name, logits.cpu(), tokens)
        times[name] = bench.measure_queued(partial(rows.launch, logits))
        bench.save()
    peer = partial(_sort_and_draw, logits)
    times["torch sort"] = bench.attempt("torch sort", lambda: bench.measure_queued(peer, 10))
    bench.attempt("edits", partial(_check_edits, bench))
    bench.attempt("frequencies", partial(_check_frequencies, bench))


def _check(bench: Bench, name: str, logits: Tensor, tokens: Tensor) -> None:
    if name == "greedy":
        chosen = logits.gather(1, tokens[:, None]).squeeze(1)
        bench.check(name, float((logits.amax(1) - chosen).abs().max()), 0.0)
    if name == "penalties":
        logits = CpuEdits(MODES[name], *logits.shape).edit(logits)
    if name in ("top-k top-p", "top-p", "penalties"):
        allowed = _allowed(logits, TOP_K if "top-k" in name else logits.shape[1])
        outside = ~allowed.gather(1, tokens[:, None])
        bench.check(name, float(outside.sum()), 0.0)


def _check_edits(bench: Bench) -> None:
    """What the sampler draws from, against the CPU's edits, while tokens are drawn and counted.

    With so few tokens they are drawn again and again.
    """
    num_rows, num_steps = (64, 16) if bench.plan.on_gpu else (3, 3)
    rows = Rows(EDITED, num_rows, FEW_TOKENS, bench.plan.device)
    twin = CpuEdits(EDITED, num_rows, FEW_TOKENS)
    error, differ = 0.0, 0
    for _ in range(num_steps):
        logits = torch.randn(num_rows, FEW_TOKENS, device=bench.plan.device).to(bench.plan.dtype)
        with patch("engine.gpu_sampler.sample", wraps=sample) as spy:
            tokens = rows.launch(logits)()
        edited = spy.call_args.args[0].cpu()
        expected = twin.edit(logits.cpu())
        twin.append(tokens)
        differ += int((edited.isinf() != expected.isinf()).sum())
        differ += int(expected.gather(1, tokens[:, None]).isinf().sum())
        kept = expected.isfinite()
        error = max(error, worst_row_error(edited.where(kept, 0.0), expected.where(kept, 0.0)))
    bench.check("edited logits", error, 1e-6)
    bench.check("banned tokens", float(differ), 0.0)


def _allowed(logits: Tensor, top_k: int) -> Tensor:
    """bool [S, V]; ties at the edge belong to both sides."""
    ordered, _ = (logits.double() / TEMPERATURE).sort(descending=True)
    weights = torch.softmax(ordered[:, :top_k], -1)
    kept = (weights.cumsum(-1) - weights < TOP_P * (1 + 1e-6)).sum(1)
    least = ordered.gather(1, kept[:, None] - 1)
    return logits.double() / TEMPERATURE >= least


def _check_frequencies(bench: Bench) -> None:
    """Total variation distance of draws of equal rows: about sqrt(V / (2 pi n)) by chance."""
    num_rows, num_steps = (256, 64) if bench.plan.on_gpu else (8, 3)
    logits = torch.randn(FEW_TOKENS, device=bench.plan.device)
    rows = Rows(MODES["temperature"], num_rows, FEW_TOKENS, bench.plan.device)
    equal = logits.expand(num_rows, -1).contiguous()
    drawn = torch.cat([rows.launch(equal)() for _ in range(num_steps)])
    found = torch.bincount(drawn, minlength=FEW_TOKENS).double() / len(drawn)
    expected = torch.softmax(logits.double() / TEMPERATURE, 0).cpu()
    distance = float((found - expected).abs().sum() / 2)
    bench.check("frequencies", distance, 3 * (FEW_TOKENS / (6.28 * len(drawn))) ** 0.5)


def _sort_and_draw(logits: Tensor) -> Tensor:
    """Top-k and top-p as they are written down: sort, cut, draw."""
    ordered, order = (logits.float() / TEMPERATURE).sort(descending=True)
    ordered[:, TOP_K:] = -torch.inf
    weights = torch.softmax(ordered, -1)
    weights[weights.cumsum(-1) - weights >= TOP_P] = 0
    # A race of exponentials, as vLLM draws: multinomial may wait for the GPU.
    races = weights / torch.empty_like(weights).exponential_()
    return order.gather(1, races.argmax(-1, keepdim=True))
