"""The goals set before anything was measured, and what a report says of each."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu.bench import Report

LINEARS_OVER_CUBLAS = {1: 2.8, 16: 3.0, 32: 2.6, 64: 1.9, 128: 1.1, 256: 0.8, 1024: 0.8, 4096: 0.93}
LINEARS_OVER_TINYGEMM = {1: 1.2, 16: 3.0, 64: 8.0}
LINEARS_OVER_MARLIN = {1: 1.0, 16: 1.0, 32: 1.0, 64: 1.0}
# Peers of attention, as reports name them; SDPA's other names say the backend.
FLASH_3, FLEX, GATHERED = "FlashAttention-3", "flex_attention", "SDPA after gathering"
DECODE_TOKENS_PER_S = {  # goals at a context of 1,024: engine, keys and values, streams
    ("engine_int4", "plain", "1"): 550.0,
    ("engine_bf16", "plain", "1"): 220.0,
    ("engine_int4", "plain", "64"): 12_300.0,
    ("engine_int4", "int8", "64"): 17_400.0,
    ("engine_int4", "int8", "256"): 18_600.0,
}


@dataclass(frozen=True, slots=True)
class Target:
    what: str
    goal: float
    found: float | None  # None: not measured
    at_most: bool = False  # the goal is the most it may be, not the least
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.goal if self.at_most else self.found >= self.goal

    @property
    def ratio(self) -> float | None:
        """Found over goal, more than 1 being better."""
        if self.found is None or self.found == 0:
            return None
        return self.goal / self.found if self.at_most else self.found / self.goal


def targets(report: Report) -> list[Target]:
    return [*_linears(report), *_attention(report), *_sampling(report), *_engine(report)]


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def _get(report: Report, *path: str) -> float | None:
    value = report
    for name in path:
        if not isinstance(value, dict) or value.get(name) is None:
            return None
        value = value[name]
    return float(value)  # type: ignore[arg-type]


def linear_sums(report: Report, name: str) -> dict[int, float]:
    """Microseconds of the four shapes together, by rows; only where all four were measured."""
    rows = report.get("linears", {}).get("rows", [])
    num_shapes = len({row["shape"] for row in rows})
    sums: dict[int, list[float]] = {}
    for row in rows:
        if row.get(f"{name}_us") is not None:
            sums.setdefault(row["m"], []).append(row[f"{name}_us"])
    return {m: sum(times) for m, times in sums.items() if len(times) == num_shapes}


def _linears(report: Report) -> Iterator[Target]:
    ours = linear_sums(report, "ours")
    for peer, label, goals in (
        ("cublas", "cuBLAS bf16", LINEARS_OVER_CUBLAS),
        ("marlin", "Marlin", LINEARS_OVER_MARLIN),
        ("tinygemm", "tinygemm", LINEARS_OVER_TINYGEMM),
    ):
        sums = linear_sums(report, peer)
        for m, goal in goals.items():
            gain = _ratio(sums.get(m), ours.get(m))
            yield Target(f"int4 linears over {label}, M={m}", goal, gain)


def _attention(report: Report) -> Iterator[Target]:
    contexts = report.get("decode_attention", {}).get("contexts", {})
    read = _get(report, "ceilings", "read_tb_s")
    for context, rows in contexts.items():
        plain, peers = _get(rows, "plain", "us"), rows.get("peers") or {}
        share = _ratio(_get(rows, "plain", "tb_s"), read)
        yield Target(f"decode attention, share of read rate, context {context}", 0.85, share)
        for name, goal in (("int8", 1.6), ("int4", 2.2)):
            gain = _ratio(plain, _get(rows, name, "us"))
            yield Target(f"{name} keys and values over plain, context {context}", goal, gain)
        for name, us, goal in (
            (FLASH_3, peers.get(FLASH_3), 0.95),
            ("SDPA", _fastest_sdpa(peers), 1.0),
            (GATHERED, peers.get(GATHERED), 3.0),
            (FLEX, peers.get(FLEX), 1.5),
        ):
            if us is not None or name != FLEX:  # measured at one context
                label = f"decode attention over {name}, context {context}"
                yield Target(label, goal, _ratio(us, plain))
    for length, rows in report.get("prefill_attention", {}).get("prompts", {}).items():
        plain, peers = _get(rows, "plain", "us"), rows.get("peers") or {}
        for name, us, goal in (
            ("SDPA", _fastest_sdpa(peers), 0.7),
            (FLASH_3, peers.get(FLASH_3), 0.55),
        ):
            label = f"prompt attention over {name}, {length} tokens"
            yield Target(label, goal, _ratio(us, plain))


def _fastest_sdpa(peers: Report) -> float | None:
    """Over contiguous keys and values."""
    times = [us for name, us in peers.items() if name.startswith("SDPA") and name != GATHERED]
    return min(times, default=None)


def _sampling(report: Report) -> Iterator[Target]:
    ours = _get(report, "sampling", "us", "top-k top-p")
    sort = _get(report, "sampling", "us", "torch sort")
    yield Target("top-k and top-p, 64 rows, over torch.sort", 5.0, _ratio(sort, ours))
    yield Target("top-k and top-p, 64 rows", 100.0, ours, at_most=True, unit="us")


def _engine(report: Report) -> Iterator[Target]:
    def speed(stage: str, kv: str, streams: str) -> float | None:
        return _get(report, stage, kv, "decode", streams, "tokens_per_s")

    for (stage, kv, streams), goal in DECODE_TOKENS_PER_S.items():
        label = f"{stage.removeprefix('engine_')} weights, {kv} KV, {streams} streams"
        yield Target(label, goal, speed(stage, kv, streams), unit="tok/s")
    int8, plain = (speed("engine_int4", kv, "256") for kv in ("int8", "plain"))
    yield Target("int8 KV over plain, 256 streams", 1.3, _ratio(int8, plain))
    for kind, streams, goal in (("generate", "1", 5.0), ("generate_batch", "64", 3.0)):
        peer = _get(report, "transformers_speed", kind, "tokens_per_s")
        gain = _ratio(speed("engine_int4", "plain", streams), peer)
        yield Target(f"over transformers {kind}, {streams} streams", goal, gain)
    prefill = _get(report, "engine_int4", "plain", "prefill_tokens_per_s")
    yield Target("prompts of 1,024 tokens", 36_000.0, prefill, unit="tok/s")
    first = _get(report, "engine_int4", "plain", "ttft_ms")
    yield Target("first token of a prompt of 1,024", 30.0, first, at_most=True, unit="ms")
    for streams in ("1", "16", "64", "256"):
        share = _get(report, "engine_int4", "int8", "decode", streams, "waiting_share")
        label = f"GPU waiting for the host, {streams} streams"
        yield Target(label, 0.02, share, at_most=True, unit="")
