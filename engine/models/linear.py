"""The layers that hold weights, each as one rank's shard.

Column-parallel: a rank has some output features and needs no communication. Row-parallel: it has
some input features, and the ranks' results are summed. Vocabulary-parallel: it has some token ids.
"""

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor

from engine.parallel import ParallelGroup
from kernels.activation import silu_mul
from kernels.dense_linear import DenseWeight, dense_linear
from kernels.embedding import embed
from kernels.gpu import on_gpu
from kernels.gpu.w4a16_pack import W4A16Weight
from kernels.int4_linear import Int4Weight, int4_linear, int4_silu_mul
from kernels.int8_linear import Int8Weight, int8_linear
from kernels.partials import Partials


@dataclass(frozen=True, slots=True)
class Linear:
    """x [T, K] -> [T, N]; with `partial` perhaps its parts, for a kernel that adds them up."""

    weight: DenseWeight | Int4Weight | Int8Weight
    bias: Tensor | None = None

    @overload
    def __call__(self, x: Tensor, partial: Literal[False] = False) -> Tensor: ...

    @overload
    def __call__(self, x: Tensor, partial: bool) -> Tensor | Partials: ...

    def __call__(self, x: Tensor, partial: bool = False) -> Tensor | Partials:
        if isinstance(self.weight, DenseWeight):
            return dense_linear(x, self.weight, self.bias)
        if isinstance(self.weight, Int8Weight):
            return int8_linear(x, self.weight, self.bias)
        return int4_linear(x, self.weight, self.bias, partial)


@dataclass(frozen=True, slots=True)
class GatedLinear:
    """x [T, K] -> silu(gate(x)) * up(x), [T, N/2]; the outputs are gate's and then up's."""

    linear: Linear

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        if isinstance(weight, W4A16Weight):
            return int4_silu_mul(x, weight, self.linear.bias)
        return silu_mul(self.linear(x))


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """x [T, K/tp] -> [T, N], equal on all ranks; the bias is added to the sum, once.

    Alone in its group it may leave the parts of the product for the next kernel to add up.
    """

    linear: Linear
    bias: Tensor | None
    group: ParallelGroup

    def __call__(self, x: Tensor) -> Tensor | Partials:
        if self.group.size == 1:
            assert self.bias is None, "the linear adds it"
            return self.linear(x, partial=True)
        y = self.group.all_reduce(self.linear(x))
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class VocabParallelEmbedding:
    """Token ids [T] -> [T, H]; the rank's rows [Vp/tp, H] start at token id `first`."""

    weight: Tensor
    first: int
    group: ParallelGroup

    def __call__(self, input_ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return embed(input_ids, self.weight)
        return self.group.all_reduce(embed(input_ids, self.weight, self.first))


@dataclass(frozen=True, slots=True)
class VocabParallelHead:
    """hidden [L, H] -> logits [L, V] on rank 0, None on the others.

    float32 on a CPU; the kernels of a GPU convert what they read.

    The last rank's rows are padded with zeros when tp does not divide the vocabulary.
    """

    linear: Linear  # [Vp/tp, H]
    vocab_size: int
    group: ParallelGroup

    def __call__(self, hidden: Tensor) -> Tensor | None:
        logits = self.group.gather_columns(self.linear(hidden))
        if logits is None:
            return None
        logits = logits[:, : self.vocab_size]
        return logits if on_gpu(logits) else logits.float()
