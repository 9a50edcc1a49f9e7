"""Log probabilities of given tokens and of the most likely ones, as the model itself has them.

They are log_softmax(logits): before penalties, bans, temperature and top_k/top_p/min_p.
"""

import torch
from torch import Tensor

from engine.outputs import TokenLogprobs

# Alternatives looked at beyond those asked for, so that of equal logits (common in bf16) the
# lowest ids are reported, as greedy sampling picks them.
_EXTRA_TIES = 8


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Entries for token_ids [n] under logits [n, V], each with `num_top` alternatives.

    A token's rank is 1 + the number of strictly more likely tokens.
    """
    if len(token_ids) == 0:
        return []
    token_ids = token_ids.to(logits.device, torch.int64)
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None])
    above = torch.gt(logits, chosen, out=torch.empty_like(logits))  # float: exact below 2**24
    top_ids, top_logits = _largest(logits, num_top)
    return [
        TokenLogprobs(*entry)
        for entry in zip(
            token_ids.tolist(),
            (chosen - normaliser)[:, 0].tolist(),
            (above.sum(dim=1) + 1).to(torch.int64).tolist(),
            top_ids.tolist(),
            (top_logits - normaliser).tolist(),
            strict=True,
        )
    ]


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and values [n, k], greatest first, equal ones by id."""
    num_seen = min(k + _EXTRA_TIES, logits.shape[1]) if k > 0 else 0
    values, ids = logits.topk(num_seen, dim=1)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order)[:, :k], values[:, :k]
