"""How a spec is cut over pp stages of tp ranks, and which values can cut it.

Layers are dealt to the stages in equal runs, one more to the first ones where they do not come
out even: the last stage has the head to compute. Within a stage query heads, the MLP's inner
features and (padded) token ids are dealt in equal runs. With more ranks than kv heads,
neighbouring ranks share one.
"""

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds, as ranges of the whole model's indices."""

    heads: range
    kv_heads: range
    inner: range  # the MLP's intermediate features
    vocab: range  # may end beyond vocab_size: padding
    layers: range
    is_first: bool  # of the stages: it embeds
    is_last: bool  # it has the final norm and the head

    @classmethod
    def of(cls, spec: DecoderSpec, rank: int, tp: int, stage: int = 0, pp: int = 1) -> "Shard":
        """Of the `rank`-th of the tp ranks of a stage."""
        kv_heads = (
            _run(spec.num_kv_heads, rank, tp)
            if spec.num_kv_heads >= tp
            else _run(spec.num_kv_heads, rank * spec.num_kv_heads // tp, spec.num_kv_heads)
        )
        return cls(
            heads=_run(spec.num_heads, rank, tp),
            kv_heads=kv_heads,
            inner=_run(spec.intermediate_size, rank, tp),
            vocab=_run(-(-spec.vocab_size // tp) * tp, rank, tp),
            layers=stage_layers(spec.num_layers, stage, pp),
            is_first=stage == 0,
            is_last=stage == pp - 1,
        )


def stage_layers(num_layers: int, stage: int, pp: int) -> range:
    """The layers of a stage."""
    size, more = divmod(num_layers, pp)
    start = stage * size + min(stage, more)
    return range(start, start + size + (stage < more))


def check_pp(spec: DecoderSpec, pp: int) -> None:
    """ConfigError when there are fewer layers than stages."""
    if pp > spec.num_layers:
        raise ConfigError(
            f"pp={pp} does not fit this model: it has {spec.num_layers} layers, and every stage "
            "needs one"
        )


def check_tp(spec: DecoderSpec, tp: int) -> None:
    """ConfigError, naming the allowed values, when the model cannot be cut over `tp` ranks."""
    reason = _obstacle(spec, tp)
    if reason:
        allowed = [str(n) for n in range(1, spec.num_heads + 1) if not _obstacle(spec, n)]
        raise ConfigError(
            f"tp={tp} does not fit this model: {reason}; allowed: {', '.join(allowed)}"
        )


def _obstacle(spec: DecoderSpec, tp: int) -> str | None:
    if spec.num_heads % tp:
        return f"its {spec.num_heads} attention heads are no multiple of {tp}"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        return f"its {spec.num_kv_heads} kv heads neither split over {tp} ranks nor repeat evenly"
    if spec.intermediate_size % tp:
        return f"its intermediate_size {spec.intermediate_size} is no multiple of {tp}"
    return None


def _run(total: int, index: int, parts: int) -> range:
    """The index-th of `parts` equal runs of range(total)."""
    size = total // parts
    return range(index * size, (index + 1) * size)
