"""Worker: one rank of an engine on CPUs: its KV cache and, where tokens are drawn, the sampler.

Computes its stage of the steps it is given; decides nothing about them. Tokens are drawn on rank 0
of the last stage. The worker of a GPU is engine/gpu_worker.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from engine.batch import PENDING, Batch, Sampling
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.executor import EngineInfo, PendingStep
from engine.outputs import StepResult, TokenLogprobs
from engine.parallel import ParallelGroup
from engine.prompt_scores import SCORE_ROWS, split_scores
from engine.rank_model import RankModel, free_memory, resolve_device
from engine.sampler import Sampler, token_logprobs
from engine.weights.peers import Peers
from kernels.attention import AttentionMetadata

if TYPE_CHECKING:
    from engine.gpu_worker import GpuWorker

AnyWorker: TypeAlias = "Worker | GpuWorker"


def make_worker(
    config: EngineConfig, group: ParallelGroup, peers: Peers | None = None
) -> AnyWorker:
    """`peers` may have the packed weights, or a checkpoint that is not on this node."""
    if resolve_device(config.device) == "cpu":
        return Worker(config, group, peers)
    from engine.gpu_worker import GpuWorker  # imports triton

    return GpuWorker(config, group, peers)


@dataclass(frozen=True, slots=True)
class _Known:
    """The result of a step that is computed already."""

    result: StepResult

    def get(self) -> StepResult:
        return self.result


class Worker:
    def __init__(
        self, config: EngineConfig, group: ParallelGroup, peers: Peers | None = None
    ) -> None:
        torch.set_num_threads(config.threads_per_rank(group.num_neighbours))
        self.model = model = RankModel.load(config, group, "cpu", peers)
        num_blocks = model.count_blocks(free_memory("cpu"))
        self.info: EngineInfo = model.info(num_blocks, max_in_flight=group.num_stages)
        self._kv_cache = model.allocate_cache(num_blocks)
        session_len = self.info.session_len
        self._tables = BlockTables(config.max_num_seqs, session_len, model.block_size)
        self._sampler = Sampler(model.spec.vocab_size, config.max_num_seqs, session_len, "cpu")

    def launch(self, batch: Batch, sampling: Sampling | None) -> PendingStep | None:
        """Run one step where all layers are here; the result exists on rank 0, as `sampling`."""
        result = self.finish(batch, self.forward(batch, None), sampling)
        return None if result is None else _Known(result)

    def close(self) -> None:
        """Free the keys and values; no call may follow."""
        del self._kv_cache, self._sampler

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """This stage's layers: [T, H] of the stage before (None: this is the first) -> [T, H]."""
        assert batch.input_ids.min() != PENDING, "this worker is not driven ahead"
        places = self._tables.advance(batch)
        meta = AttentionMetadata.build(
            batch.query_start_loc,
            batch.context_lens,
            places.block_tables,
            places.slot_mapping,
            batch.num_decodes,
            self.model.block_size,
            "cpu",
        )
        if hidden is None:
            hidden = torch.from_numpy(batch.input_ids).to(torch.int64)
        positions = torch.from_numpy(places.positions).to(torch.int64)
        return self.model.decoder.forward(hidden, positions, meta, self._kv_cache)

    @torch.inference_mode()
    def finish(
        self, batch: Batch, hidden: torch.Tensor, sampling: Sampling | None
    ) -> StepResult | None:
        """Draw and score tokens from the last stage's [T, H]; only its rank 0 has `sampling`."""
        indices = torch.from_numpy(batch.logit_indices).to(torch.int64)
        logits = self.model.decoder.logits(hidden[indices[: batch.num_sampled]])
        scored = self._score(hidden, indices[batch.num_sampled :], sampling)
        if sampling is None:
            return None
        assert logits is not None, "logits are gathered on rank 0 of the stage"
        sampled = self._sampler.sample(logits, sampling.batch)
        prompt_logprobs = split_scores(scored, sampling.scores)
        return StepResult(sampled.token_ids, sampled.logprobs, prompt_logprobs, sampled.invalid)

    def _score(
        self, hidden: torch.Tensor, indices: torch.Tensor, sampling: Sampling | None
    ) -> list[TokenLogprobs]:
        """Log probabilities of known prompt tokens; every rank takes part in the gathers."""
        entries: list[TokenLogprobs] = []
        scores = sampling.scores if sampling is not None else []
        token_ids = torch.tensor([t for score in scores for t in score.token_ids])
        num_top = max((score.num_top for score in scores), default=0)
        for start in range(0, len(indices), SCORE_ROWS):
            logits = self.model.decoder.logits(hidden[indices[start : start + SCORE_ROWS]])
            if logits is not None:
                entries += token_logprobs(logits, token_ids[start : start + SCORE_ROWS], num_top)
        return entries
