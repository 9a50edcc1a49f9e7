"""DecodeGraphs: steps of decode rows alone, recorded once per bucket and replayed.

A decode step of a small model is a thousand launches whose host time exceeds the GPU's; a replay is
one. A bucket is a number of rows; a step takes the smallest that holds it, and the rest is padding,
which the kernels skip. What a graph reads and writes stays where it is: the step's tensors, the
KV cache, and the outputs below, which all buckets share.

In Triton's interpreter there are no graphs: a step is computed anew, padded as its bucket.
"""

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.gpu import has_gpu

Outputs = tuple[Tensor, Tensor | None]  # hidden [n, H] and, on rank 0, logits [n, V]


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Ascending. Multiples of 8 and then 16 fill the rows of the tiles that products work on."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    def __init__(self, compute: Callable[[int], Outputs], sizes: Sequence[int]) -> None:
        """`compute(n)` computes a step of n decode rows, padding included, from static memory."""
        self._compute = compute
        self.sizes = sorted(sizes)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: Outputs | None = None  # of the largest bucket

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int] | None = None) -> None:
        """Record these buckets (None: all), the largest first: the others fit into its memory."""
        if not has_gpu():
            return
        gc.collect()
        gc.disable()  # freeing a tensor while a graph is recorded would break it
        try:
            for size in sorted(sizes or self.sizes, reverse=True):
                self._record(size)
        finally:
            gc.enable()

    def _record(self, size: int) -> None:
        warm = self._compute(size)  # compiles kernels, and libraries take their memory
        if self._outputs is None:
            assert size == self.sizes[-1]
            hidden, logits = warm
            self._outputs = torch.empty_like(hidden), _empty_like(logits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next((known.pool() for known in self._graphs.values()), None)
        # thread_local: NCCL's watchdog thread asks the driver about other work meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            for kept, computed in zip(self._outputs, self._compute(size), strict=True):
                if kept is not None and computed is not None:
                    kept[:size].copy_(computed)
        self._graphs[size] = graph

    def replay(self, num_seqs: int) -> Outputs:
        """Compute a step of so many decode rows; what it returns is overwritten by the next."""
        if not has_gpu():
            return self.compute_padded(num_seqs)
        assert self._outputs is not None
        self._graphs[self._bucket(num_seqs)].replay()
        return _cut(self._outputs, num_seqs)

    def compute_padded(self, num_seqs: int) -> Outputs:
        """The same eagerly."""
        return _cut(self._compute(self._bucket(num_seqs)), num_seqs)

    def _bucket(self, num_seqs: int) -> int:
        return next(size for size in self.sizes if size >= num_seqs)

    def close(self) -> None:
        """Free what was recorded; none of it may be running."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._outputs = None


def _cut(outputs: Outputs, num_seqs: int) -> Outputs:
    hidden, logits = outputs
    return hidden[:num_seqs], None if logits is None else logits[:num_seqs]


def _empty_like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x)
