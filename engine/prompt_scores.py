"""Scores of prompt tokens: a step's log probabilities, given back to the requests that asked."""

from dataclasses import replace

from engine.batch import PromptScore
from engine.outputs import TokenLogprobs

SCORE_ROWS = 256  # prompt tokens whose logits exist at once: 256 × 128k × 4 B = 131 MB


def split_scores(
    entries: list[TokenLogprobs], scores: list[PromptScore]
) -> list[tuple[int, list[TokenLogprobs]]]:
    """By row of the batch; `entries` are those of all scores, end to end."""
    parts: list[tuple[int, list[TokenLogprobs]]] = []
    start = 0
    for score in scores:
        end = start + len(score.token_ids)
        parts.append(
            (score.seq_index, [_cut(entry, score.num_top) for entry in entries[start:end]])
        )
        start = end
    return parts


def _cut(entry: TokenLogprobs, num_top: int) -> TokenLogprobs:
    """A step scores with the most alternatives anybody asked for."""
    return replace(
        entry,
        top_token_ids=entry.top_token_ids[:num_top],
        top_logprobs=entry.top_logprobs[:num_top],
    )
