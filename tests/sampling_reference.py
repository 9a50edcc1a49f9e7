"""The sampler once more, slowly: one row at a time, in plain Python and float64.

Written from the definitions, not from engine/: what the tests hold the batched sampler against.
"""

import math
from dataclasses import dataclass, field

from engine.sampling_params import SamplingParams

FLOAT32_ROUNDING = 3e-6  # what a cut or a cumulative sum may be off by in the fast sampler


@dataclass
class ReferenceRow:
    """One sequence and its own copy of every rule."""

    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    prompt: list[int]
    output: list[int] = field(default_factory=list)

    def edited(self, raw: list[float]) -> list[float]:
        """Logits after penalties, bias and bans."""
        params, logits = self.params, list(raw)
        for token_id in set(self.prompt + self.output):
            factor = params.repetition_penalty
            logits[token_id] *= factor if logits[token_id] < 0 else 1 / factor
        for token_id in set(self.output):
            count = self.output.count(token_id)
            logits[token_id] -= params.presence_penalty + params.frequency_penalty * count
        for token_id, bias in params.logit_bias.items():
            logits[token_id] += bias
        for token_id in self.banned(len(raw)):
            logits[token_id] = -math.inf
        return logits

    def banned(self, vocab_size: int) -> set[int]:
        params, history = self.params, self.prompt + self.output
        banned = set()
        if params.allowed_token_ids is not None:
            banned |= set(range(vocab_size)) - set(params.allowed_token_ids)
        for word in params.bad_words:
            before = list(word[:-1])
            if len(history) >= len(before) and history[len(history) - len(before) :] == before:
                banned.add(word[-1])
        if len(self.output) < params.min_tokens:
            banned |= {*self.eos_token_ids, *params.stop_token_ids}
        return banned

    def distribution(self, raw: list[float]) -> tuple[dict[int, float], bool]:
        """Probabilities of the tokens that may be drawn; False when a cut is a close call."""
        logits, params = self.edited(raw), self.params
        greatest = max(logits)
        if params.temperature == 0:
            return {logits.index(greatest): 1.0}, True
        weights = [math.exp((logit - greatest) / params.temperature) for logit in logits]
        ranked = sorted(range(len(weights)), key=lambda token_id: (-weights[token_id], token_id))
        if params.top_k > 0:
            ranked = ranked[: params.top_k]
        clear = True
        if params.top_p < 1:
            total, mass, kept = sum(weights[i] for i in ranked), 0.0, 0
            while mass < params.top_p * total and kept < len(ranked):
                clear &= abs(mass / total - params.top_p) > FLOAT32_ROUNDING
                mass += weights[ranked[kept]]
                kept += 1
            clear &= abs(mass / total - params.top_p) > FLOAT32_ROUNDING
            ranked = ranked[:kept]
        clear &= all(abs(weights[i] - params.min_p) > FLOAT32_ROUNDING for i in ranked)
        kept_ids = sorted(i for i in ranked if weights[i] >= params.min_p and weights[i] > 0)
        total = sum(weights[i] for i in kept_ids)
        return {i: weights[i] / total for i in kept_ids}, clear

    def choices(self, raw: list[float]) -> set[int]:
        """The token to be drawn next, or two when the uniform number lies on their border.

        Empty when rounding may decide what is kept.
        """
        probabilities, clear = self.distribution(raw)
        if not clear:
            return set()
        target, below, found = uniform(self.seed, len(self.output)), 0.0, set()
        for token_id, probability in probabilities.items():
            low, high = below - FLOAT32_ROUNDING, below + probability + FLOAT32_ROUNDING
            if low <= target < high:
                found.add(token_id)
            below += probability
        return found


def uniform(seed: int, position: int) -> float:
    seed %= 2**64
    words = philox([position % 2**32, position >> 32, 0, 0], [seed % 2**32, seed >> 32])
    return (2 * ((words[0] << 32 | words[1]) >> 12) + 1) / 2**53


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as its paper writes it (Salmon et al. 2011, section 4.3)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (high >> 32) ^ c1 ^ k0,
            high % 2**32,
            (low >> 32) ^ c3 ^ k1,
            low % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]
