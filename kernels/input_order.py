"""Act-order: a weight whose inputs were sorted wants its rows' values sorted alike."""

from torch import Tensor


def in_order(x: Tensor, input_order: Tensor | None) -> Tensor:
    """x [M, inputs] -> [M, K]: value k is input_order[k]'s.

    A pass of its own over x, which is small where weights matter: gathered inside the product, its
    columns could not be copied 16 bytes at a time.
    """
    return x if input_order is None else x.index_select(1, input_order)


def in_own_order(weight: Tensor, input_order: Tensor | None) -> Tensor:
    """weight [N, K] of sorted inputs -> [N, inputs], column k added to that of input_order[k].

    Adding, not setting: an input that repeats as padding, with weights of zero, keeps its own.
    """
    if input_order is None:
        return weight
    num_inputs = int(input_order.max()) + 1
    if weight.is_meta:  # sizes are all that is asked for
        return weight.new_empty(len(weight), num_inputs)
    return weight.new_zeros(len(weight), num_inputs).index_add_(1, input_order, weight)
