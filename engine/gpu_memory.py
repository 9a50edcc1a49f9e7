"""How much of a GPU's memory is left for keys and values, measured by computing what takes most.

Steps are computed over a cache of two blocks: prompts of all sizes up to the most tokens a step may
have, and the most decode rows. What the allocator holds after them is what activations need; graphs
add their own. This also compiles the kernels, so that no request waits for it. No value of these
steps means anything.
"""

import gc
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from engine.batch import Batch
from engine.cuda_graphs import bucket_sizes
from engine.gpu_steps import GpuSteps
from engine.prompt_scores import SCORE_ROWS
from engine.rank_model import RankModel, free_memory


def free_for_cache(model: RankModel) -> int:
    """Bytes."""
    if isinstance(model.config.cache_max_entry_count, int) and not torch.cuda.is_available():
        return 0  # nobody asks, and the interpreter has nothing to compile
    steps = GpuSteps(model, model.allocate_cache(2), model.session_limit)
    for batch in (*_prompt_steps(model), _decode_step(model)):
        _compute(model, steps, batch)
    free = free_memory(model.device)
    graph_bytes = _graph_bytes(steps, model.config.max_num_seqs)
    del steps
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return free - graph_bytes


def _prompt_steps(model: RankModel) -> Iterator[Batch]:
    """Powers of two tokens, for which products have kernels of their own, then the most."""
    most, limit = model.config.max_num_batched_tokens, model.session_limit
    for tokens in (*(2**power for power in range(4, 20) if 2**power < most), most):
        lengths = [limit] * (tokens // limit) + [tokens % limit] * (tokens % limit > 0)
        yield _batch(lengths[: model.config.max_num_seqs], None)


def _decode_step(model: RankModel) -> Batch:
    """The most rows that decode, each at the end of a full session."""
    config = model.config
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    return _batch([1] * num_seqs, model.session_limit)


def _batch(num_new: list[int], context_len: int | None) -> Batch:
    """Tokens 0; all rows share block 0, which the tables name where nothing is written."""
    num_tokens, num_seqs = sum(num_new), len(num_new)
    batch = Batch.allocate(
        tokens=num_tokens,
        seqs=num_seqs,
        logits=0,
        changes=0,
        num_sampled=0,
        num_decodes=num_new.count(1) if context_len is not None else 0,
    )
    batch.input_ids[:] = 0
    batch.rows[:] = np.arange(num_seqs)
    batch.query_start_loc[:] = np.cumsum([0, *num_new])
    batch.context_lens[:] = num_new if context_len is None else context_len
    return batch


@torch.inference_mode()
def _compute(model: RankModel, steps: GpuSteps, batch: Batch) -> None:
    hidden = None
    if model.group.stage > 0:
        shape = batch.num_tokens, model.spec.hidden_size
        hidden = torch.zeros(shape, dtype=model.dtype, device=model.tensor_device)
    hidden = steps.forward(batch, hidden)
    if model.group.is_last_stage:
        rows = max(model.config.max_num_seqs, SCORE_ROWS)
        model.decoder.logits(hidden[:rows])


def _graph_bytes(steps: GpuSteps, max_num_seqs: int) -> int:
    """What the graphs will take: the largest its memory, each one about as much as the second."""
    if steps.graphs is None or not torch.cuda.is_available():
        return 0
    free = [_free_without_cached()]
    sizes = bucket_sizes(max_num_seqs)
    for size in sizes[:-3:-1]:
        steps.graphs.capture([size])
        free.append(_free_without_cached())
    taken = [before - after for before, after in itertools.pairwise(free)]
    return taken[0] + sum(taken[1:]) * (len(sizes) - 1)


def _free_without_cached() -> int:
    """Capturing gives back what torch holds unused, so that must not count before it either."""
    torch.cuda.empty_cache()
    return free_memory("cuda")
