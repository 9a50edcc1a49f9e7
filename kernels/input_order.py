"""Act-order: a weight whose inputs were sorted wants its rows' values sorted alike."""

import torch
from torch import Tensor


def in_order(x: Tensor, input_order: Tensor | None) -> Tensor:
    """x [M, inputs] -> [M, K]: value k is input_order[k]'s.

    A pass of its own over x, which is small where weights matter: gathered inside the product, its
    columns could not be copied 16 bytes at a time.
    """
    return x if input_order is None else x.index_select(1, input_order)


def in_own_order(rows: Tensor, input_order: Tensor | None) -> Tensor:
    """rows [K, N] of sorted inputs -> [inputs, N], row k added to that of input_order[k].

    Adding, not setting: an input that repeats as padding, with weights of zero, keeps its own.
    """
    if input_order is None:
        return rows
    num_inputs = int(input_order.max()) + 1
    if rows.is_meta:  # sizes are all that is asked for
        return rows.new_empty(num_inputs, rows.shape[1])
    if num_inputs == len(rows):
        return rows.index_select(0, torch.argsort(input_order))
    return rows.new_zeros(num_inputs, rows.shape[1]).index_add_(0, input_order, rows)
