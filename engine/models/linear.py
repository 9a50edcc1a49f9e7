"""The layers that hold weights, each as one rank's shard.

Column-parallel: a rank has some output features and needs no communication. Row-parallel: it has
some input features, and the ranks' results are summed. Vocabulary-parallel: it has some token ids.
"""

from dataclasses import dataclass

from torch import Tensor

from engine.parallel import ParallelGroup
from kernels.dense_linear import DenseWeight, dense_linear
from kernels.embedding import embed
from kernels.int4_linear import Int4Weight, int4_linear
from kernels.int8_linear import Int8Weight, int8_linear


@dataclass(frozen=True, slots=True)
class Linear:
    """x [T, K] -> [T, N]."""

    weight: DenseWeight | Int4Weight | Int8Weight
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, DenseWeight):
            return dense_linear(x, self.weight, self.bias)
        if isinstance(self.weight, Int8Weight):
            return int8_linear(x, self.weight, self.bias)
        return int4_linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """x [T, K/tp] -> [T, N], equal on all ranks; the bias is added to the sum, once."""

    linear: Linear
    bias: Tensor | None
    group: ParallelGroup

    def __call__(self, x: Tensor) -> Tensor:
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
    """hidden [L, H] -> logits float32 [L, V] on rank 0, None on the others.

    The last rank's rows are padded with zeros when tp does not divide the vocabulary.
    """

    linear: Linear  # [Vp/tp, H]
    vocab_size: int
    group: ParallelGroup

    def __call__(self, hidden: Tensor) -> Tensor | None:
        logits = self.group.gather_columns(self.linear(hidden))
        return None if logits is None else logits[:, : self.vocab_size].float()
