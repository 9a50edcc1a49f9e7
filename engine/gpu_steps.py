"""GpuSteps: one GPU rank's stage of the decoder, step after step, over one KV cache.

A step is one copy of its packed batch to the GPU and, if all its rows decode, the replay of a
graph. Nothing here waits for the GPU. Steps are computed in the order of their launch, on one
stream: what a step reads, those before it have written, and blocks and rows may be given away
while steps that use them are still to run.
"""

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, buffer_size, table_width
from engine.cuda_graphs import DecodeGraphs, Outputs, bucket_sizes
from engine.host_copies import pinned
from engine.kv_cache import KVCache
from engine.rank_model import RankModel
from kernels.gpu import has_gpu
from kernels.gpu.prepare import StepTensors, prepare
from kernels.gpu.step import GpuStep


class GpuSteps:
    def __init__(self, model: RankModel, kv_cache: KVCache, session_len: int) -> None:
        config = model.config
        seqs = config.max_num_seqs
        tokens = max(config.max_num_batched_tokens, seqs)
        width = table_width(session_len, model.block_size)
        self._model = model
        self._kv_cache = kv_cache
        self._session_len = session_len
        self._tensors = StepTensors.allocate(
            tokens,
            seqs,
            width,
            buffer_size(tokens, seqs, seqs + tokens, seqs * width),
            model.tensor_device,
        )
        self.graphs = DecodeGraphs(self._decode, bucket_sizes(seqs)) if model.has_graphs else None

    @property
    def token_pool(self) -> Tensor:
        """int32 [max_num_seqs]: the token drawn last for each row, which a PENDING id means."""
        return self._tensors.token_pool

    @torch.inference_mode()
    def run(self, batch: Batch) -> Outputs:
        """All layers: hidden [T, H] and the logits [num_sampled, V] of the tokens to sample."""
        if self.graphs is None or batch.num_decodes < batch.num_seqs:
            hidden = self.forward(batch, None)
            return hidden, self.logits(hidden, self.logit_indices(batch)[: batch.num_sampled])
        self._upload(batch)
        hidden, logits = self.graphs.replay(batch.num_seqs)
        if logits is not None and batch.num_sampled < batch.num_seqs:
            logits = logits.index_select(0, self.logit_indices(batch)[: batch.num_sampled])
        return hidden, logits

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        """This stage's layers: [T, H] of the stage before (None: this is the first) -> [T, H]."""
        self._upload(batch)
        num_new = np.diff(batch.query_start_loc[batch.num_decodes :])
        step = self._prepare(
            num_tokens=batch.num_tokens,
            num_seqs=batch.num_seqs,
            num_decodes=batch.num_decodes,
            max_query_len=int(num_new.max(initial=0)),
            max_context_len=int(batch.context_lens.max()),
        )
        return self._layers(step, step.input_ids if hidden is None else hidden)

    @torch.inference_mode()
    def pad(self, num_tokens: int, hidden: Tensor | None) -> Tensor:
        """`forward` of a prompt in time and memory, but of padding: no key or value changes."""
        self._tensors.batch.zero_()
        step = self._prepare(
            num_tokens=num_tokens,
            num_seqs=1,
            num_decodes=0,
            max_query_len=num_tokens,
            max_context_len=num_tokens,
        )
        return self._layers(step, step.input_ids if hidden is None else hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, indices: Tensor) -> Tensor | None:
        """[n, V] of these tokens of the last stage's [T, H]; None on other ranks than its first.

        No tokens need no product and no gather, and have their empty logits everywhere.
        """
        if len(indices) == 0:
            return hidden.new_empty((0, self._model.spec.vocab_size))
        return self._model.decoder.logits(hidden.index_select(0, indices))

    def logit_indices(self, batch: Batch) -> Tensor:
        """int32 [L] on the device, until the next step is launched."""
        return self._tensors.batch[batch.place_of_logit_indices]

    def close(self) -> None:
        """Wait for what was launched, then drop the graphs; no call may follow.

        They and this object refer to each other: without this, the KV cache would outlive its
        last user until Python collects cycles.
        """
        if has_gpu():
            torch.cuda.synchronize()
        if self.graphs is not None:
            self.graphs.close()
            self.graphs = None

    def _upload(self, batch: Batch) -> None:
        buffer = batch.buffer
        self._tensors.batch[: len(buffer)].copy_(pinned(buffer), non_blocking=True)

    def _decode(self, num_seqs: int) -> Outputs:
        """A step of decode rows as a graph has it: nothing depends on the host but their number."""
        step = self._prepare(
            num_tokens=num_seqs,
            num_seqs=num_seqs,
            num_decodes=num_seqs,
            max_query_len=0,
            max_context_len=self._session_len,
        )
        hidden = self._layers(step, step.input_ids)
        return hidden, self._model.decoder.logits(hidden)

    def _prepare(self, **sizes: int) -> GpuStep:
        return prepare(self._tensors, **sizes, block_size=self._model.block_size)

    def _layers(self, step: GpuStep, inputs: Tensor) -> Tensor:
        return self._model.decoder.forward(inputs, step.positions, step, self._kv_cache)
