"""How much of a GPU's memory is left for keys and values, measured by computing what takes most.

Steps are computed over a cache of two blocks: prompts of all sizes up to the most tokens a step may
have, then decode rows. What the allocator holds after them is what activations need; graphs add
their own. This also compiles the kernels that steps of these sizes take; a form that only another
mix of rows and lengths takes is compiled when that comes. No value of these steps means anything.
"""

import gc
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.gpu_steps import GpuSteps
from engine.prompt_scores import SCORE_ROWS
from engine.rank_model import RankModel, free_memory
from kernels.gpu import has_gpu

# The thread that serves is not the one that measures: cuBLAS gives it a handle and a workspace of
# its own, 32 MiB on Hopper, with its first eager step. Reckoned, not measured.
SERVING_THREAD_BYTES = 64 * 2**20


def free_for_cache(model: RankModel) -> int:
    """Bytes."""
    if isinstance(model.config.cache_max_entry_count, int) and not has_gpu():
        return free_memory(model.device)  # the interpreter has nothing to compile
    _release_cached()  # what loading and packing left
    steps = GpuSteps(model, model.allocate_cache(2), model.session_limit)
    for batch in (*_prompt_steps(model), *_decode_steps(model)):
        _compute(model, steps, batch)
    free = free_memory(model.device)  # what the allocator has cached by now, steps will need again
    graph_bytes = _graph_bytes(steps)
    steps.close()
    del steps
    _release_cached()
    return free - graph_bytes - SERVING_THREAD_BYTES


def reserve(model: RankModel, steps: GpuSteps) -> None:
    """Let torch's allocator hold again what the largest step takes, which recording graphs freed.

    What was measured then stays this engine's, whoever else uses the GPU, and the first requests
    do not wait for the driver.
    """
    num_tokens = next(_prompt_steps(model)).num_tokens
    _logits(model, steps.pad(num_tokens, _input(model, num_tokens)))


def _prompt_steps(model: RankModel) -> Iterator[Batch]:
    """The most tokens, then powers of two, for which products have kernels of their own.

    In this order the smaller fit into the memory of the largest.
    """
    most, limit = model.config.max_num_batched_tokens, model.session_limit
    for tokens in (most, *reversed(_powers(16, most))):
        lengths = [limit] * (tokens // limit) + [tokens % limit] * (tokens % limit > 0)
        yield _batch(lengths[: model.config.max_num_seqs], None)


def _decode_steps(model: RankModel) -> Iterator[Batch]:
    """The most rows and fewer, each at the end of a full session; then one of shorter sessions,
    whose attention has other numbers of parts to merge.
    """
    config, limit = model.config, model.session_limit
    most = min(config.max_num_seqs, config.max_num_batched_tokens)
    for num_seqs in (most, *reversed(_powers(1, most))):
        yield _batch([1] * num_seqs, limit)
    for context_len in _powers(16, limit):
        yield _batch([1], context_len)


def _powers(first: int, end: int) -> list[int]:
    """first, 2 first, 4 first, … below end."""
    return list(itertools.takewhile(lambda n: n < end, (first << i for i in itertools.count())))


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


def _compute(model: RankModel, steps: GpuSteps, batch: Batch) -> None:
    _logits(model, steps.forward(batch, _input(model, batch.num_tokens)))


def _input(model: RankModel, num_tokens: int) -> Tensor | None:
    """What a stage gets of the one before."""
    if model.group.stage == 0:
        return None
    shape = num_tokens, model.spec.hidden_size
    return torch.zeros(shape, dtype=model.dtype, device=model.tensor_device)


@torch.inference_mode()
def _logits(model: RankModel, hidden: Tensor) -> None:
    if model.group.is_last_stage:
        sampled = model.decoder.logits(hidden[: model.config.max_num_seqs])
        model.decoder.logits(hidden[:SCORE_ROWS])  # of prompts, scored beside those
        del sampled


def _graph_bytes(steps: GpuSteps) -> int:
    """What the graphs will take: the largest its memory, each one about as much as the second."""
    if steps.graphs is None or not has_gpu():
        return 0
    free = [_free_without_cached()]
    sizes = steps.graphs.sizes
    for size in sizes[:-3:-1]:
        steps.graphs.capture([size])
        free.append(_free_without_cached())
    taken = [before - after for before, after in itertools.pairwise(free)]
    return taken[0] + sum(taken[1:]) * (len(sizes) - 1)


def _free_without_cached() -> int:
    """Capturing gives back what torch holds unused, so that must not count before it either."""
    torch.cuda.empty_cache()
    return free_memory("cuda")


def _release_cached() -> None:
    if has_gpu():
        gc.collect()
        torch.cuda.empty_cache()
