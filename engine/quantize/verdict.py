"""A loss in words: how much a quantised model differs from its reference, and what that means.

Judged are two numbers in nats per token: the KL divergence, and the rise of the loss on the
held-out text (the logarithm of the perplexities' ratio). On text that the reference itself might
have written the two are equal on average, so that the same limits hold for both.
"""

import math
from typing import Literal

from engine.quantize.comparison import Evaluation

Level = Literal[
    "no reference",
    "unknown text",
    "indistinguishable",
    "very close",
    "close",
    "noticeable",
    "heavy",
]

# Upper limits in nats per token. What usual quantisations of models of 7B and more cost is known
# from the field's published tables: 8-bit weights about 0.001, good 4-bit ones 0.01 to 0.05,
# 3-bit ones 0.1 to 0.2 and 2-bit ones more.
INDISTINGUISHABLE = 0.001  # computing in bfloat16 instead of float32 costs as much
VERY_CLOSE = 0.01  # perplexity 1 % higher: less than between two checkpoints of one training run
CLOSE = 0.05  # perplexity 5 % higher: what a good 4-bit model of 7B costs at most
NOTICEABLE = 0.2  # perplexity 22 % higher: about the step down to a model of half the size

# Perplexity of a reference that does not know the text. Models of 100M and more have 5 to 50 on
# most text; the demo model has 9,000 on text of other kinds than it was trained on. What is lost
# where nothing was known says little about what it is used for.
UNKNOWN_TEXT = 1000.0

_LIMITS: tuple[tuple[float, Level], ...] = (
    (INDISTINGUISHABLE, "indistinguishable"),
    (VERY_CLOSE, "very close"),
    (CLOSE, "close"),
    (NOTICEABLE, "noticeable"),
)
_MEANINGS: dict[Level, str] = {
    "no reference": "What was lost shows only beside a reference: give the checkpoint that this "
    "one was made from.",
    "unknown text": "The reference cannot predict this text itself, so that the loss on it says "
    "little about the model's use: measure on text of its own kind.",
    "indistinguishable": "The answers are the reference's but for ties.",
    "very close": "Answers differ in wording now and then, not in quality.",
    "close": "Usual for good 4-bit weights; check tasks with long chains of exact steps.",
    "noticeable": "Measure your own tasks before you serve it; more bits keep "
    "more, and with weights smaller groups or another method.",
    "heavy": "Do not serve it without measuring your own tasks; more bits keep more, "
    "and with weights smaller groups or another method.",
}


def level_of(evaluation: Evaluation) -> Level:
    """The worse of what the divergence and the loss say."""
    if evaluation.kl_mean is None or evaluation.reference_perplexity is None:
        return "no reference"
    if evaluation.reference_perplexity > UNKNOWN_TEXT:
        return "unknown text"
    rise = math.log(evaluation.perplexity / evaluation.reference_perplexity)
    worst = max(evaluation.kl_mean, rise)
    return next((level for limit, level in _LIMITS if worst < limit), "heavy")


def headline(evaluation: Evaluation) -> str:
    level = level_of(evaluation)
    return f"{level} loss" if level in ("noticeable", "heavy") else level


def words(evaluation: Evaluation) -> str:
    """The verdict, what it means, and the numbers behind it."""
    return f"{headline(evaluation).capitalize()}. {explanation(evaluation)}"


def explanation(evaluation: Evaluation) -> str:
    meaning = _MEANINGS[level_of(evaluation)]
    if evaluation.kl_mean is None or evaluation.reference_perplexity is None:
        return f"Perplexity {evaluation.perplexity:.4g} on held-out text. {meaning}"
    assert evaluation.top1_agreement is not None
    change = evaluation.perplexity / evaluation.reference_perplexity - 1
    return (
        f"{meaning} The distributions of the next token are {evaluation.kl_mean:.2g} nats apart, "
        f"the likeliest token is the same in {evaluation.top1_agreement:.1%} of places, and the "
        f"perplexity changes by {change:+.2%}, from {evaluation.reference_perplexity:.4g} to "
        f"{evaluation.perplexity:.4g}."
    )
