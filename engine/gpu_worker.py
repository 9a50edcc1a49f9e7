"""GpuWorker: one rank of an engine on GPUs: its KV cache, its steps and, on rank 0, the sampler.

`launch` waits for nothing: the tokens of a step stay in the device's token pool, where the next
step finds them, and come to the host when `PendingStep.get` is asked for them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Batch, Sampling
from engine.config import EngineConfig
from engine.executor import EngineInfo
from engine.gpu_memory import free_for_cache, reserve
from engine.gpu_sampler import (
    GpuSampler,
    PendingLogprobs,
    PendingTokens,
    launch_logprobs,
    peak_bytes,
)
from engine.gpu_steps import GpuSteps
from engine.outputs import StepResult
from engine.parallel import ParallelGroup
from engine.prompt_scores import SCORE_ROWS, split_scores
from engine.rank_model import RankModel
from engine.weights.peers import Peers
from kernels.gpu import has_gpu


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step on rank 0 whose results are on their way to the host."""

    tokens: PendingTokens
    scored: list[PendingLogprobs]
    sampling: Sampling

    def get(self) -> StepResult:
        sampled = self.tokens.get()
        entries = [entry for part in self.scored for entry in part.get()]
        scored = split_scores(entries, self.sampling.scores)
        return StepResult(sampled.token_ids, sampled.logprobs, scored, sampled.invalid)


class GpuWorker:
    def __init__(
        self, config: EngineConfig, group: ParallelGroup, peers: Peers | None = None
    ) -> None:
        self.model = model = RankModel.load(config, group, "cuda", peers)
        sampler_bytes = peak_bytes(model.spec.vocab_size, config.max_num_seqs)
        num_blocks = model.count_blocks(free_for_cache(model) - sampler_bytes)
        ahead = config.enable_async_scheduling and group.num_stages == 1
        self.info: EngineInfo = model.info(num_blocks, 2 if ahead else group.num_stages)
        session_len = self.info.session_len
        self._group = group
        self._steps = GpuSteps(model, model.allocate_cache(num_blocks), session_len)
        self._sampler = GpuSampler(
            model.spec.vocab_size, config.max_num_seqs, session_len, model.tensor_device
        )
        if self._steps.graphs is not None:
            self._steps.graphs.capture()
        if has_gpu() and group.rank == 0 and group.is_last_stage:
            shape, device = (1, model.spec.vocab_size), model.tensor_device
            logits = torch.zeros(shape, dtype=model.dtype, device=device)
            self._sampler.warm_up(logits, self._steps.token_pool)
        if has_gpu():
            reserve(model, self._steps)

    def launch(self, batch: Batch, sampling: Sampling | None) -> _Pending | None:
        """Start one step where all layers are here; its result exists on rank 0, as `sampling`."""
        return self._draw(batch, *self._steps.run(batch), sampling)

    def forward(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        """This stage's layers: [T, H] of the stage before (None: this is the first) -> [T, H]."""
        return self._steps.forward(batch, hidden)

    def finish(self, batch: Batch, hidden: Tensor, sampling: Sampling | None) -> StepResult | None:
        """Draw and score tokens from the last stage's [T, H]; only its rank 0 has `sampling`."""
        indices = self._steps.logit_indices(batch)[: batch.num_sampled]
        pending = self._draw(batch, hidden, self._steps.logits(hidden, indices), sampling)
        return None if pending is None else pending.get()

    def close(self) -> None:
        """Free the graphs, then the keys and values; no call may follow."""
        self._steps.close()
        del self._steps, self._sampler
        if has_gpu():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _draw(
        self, batch: Batch, hidden: Tensor, logits: Tensor | None, sampling: Sampling | None
    ) -> _Pending | None:
        tokens = None
        if sampling is not None:
            assert logits is not None, "logits are gathered on rank 0 of the stage"
            tokens = self._sampler.launch(logits, sampling.batch, self._steps.token_pool)
        if batch.num_sampled > 0 and self._group.num_stages == 1:
            self._group.broadcast(self._steps.token_pool)  # every rank embeds them in the next step
        scored = self._score(batch, hidden, sampling)
        if sampling is None:
            return None
        assert tokens is not None
        return _Pending(tokens, scored, sampling)

    def _score(
        self, batch: Batch, hidden: Tensor, sampling: Sampling | None
    ) -> list[PendingLogprobs]:
        """Log probabilities of known prompt tokens; every rank takes part in the gathers."""
        indices = self._steps.logit_indices(batch)[batch.num_sampled :]
        if len(indices) == 0:
            return []
        scores = sampling.scores if sampling is not None else []
        num_top = max((score.num_top for score in scores), default=0)
        token_ids = torch.tensor([t for score in scores for t in score.token_ids])
        pending = []
        for start in range(0, len(indices), SCORE_ROWS):
            rows = slice(start, start + SCORE_ROWS)
            logits = self._steps.logits(hidden, indices[rows])
            if logits is not None:
                pending.append(launch_logprobs(logits, token_ids[rows], num_top))
            del logits  # before the next are computed: memory was measured with one of them
        return pending
