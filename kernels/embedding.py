"""Embedding: rows of a table by token id, where the table may be one rank's part."""

import torch.nn.functional as F
from torch import Tensor

from kernels.gpu import on_gpu


def embed(token_ids: Tensor, table: Tensor, first: int | None = None) -> Tensor:
    """token_ids [T] (int32 on a GPU), table [rows, H] -> [T, H].

    The table has the ids from `first` on, and others give zeros; None: it has all of them.
    """
    if on_gpu(table):
        from kernels.gpu.embedding import embed as gpu_embed

        return gpu_embed(token_ids, table, first or 0)
    if first is None:
        return F.embedding(token_ids, table)
    rows = token_ids - first
    elsewhere = (rows < 0) | (rows >= len(table))
    return F.embedding(rows.masked_fill(elsewhere, 0), table).masked_fill_(elsewhere[:, None], 0)
