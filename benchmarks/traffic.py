"""Traffic for benchmarks/simulate.py: generated, or read from a trace file.

A trace is CSV with the header `arrival_s,prompt_tokens,output_tokens,prefix_id,prefix_tokens`, in
the order of arrival. Requests of the same prefix_id begin with the same prefix_tokens tokens; an
empty id shares nothing.
"""

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as a trace records it."""

    time: float  # seconds since the first
    prompt_tokens: int
    output_tokens: int
    prefix_id: int | None = None
    prefix_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What `generate` draws from.

    The rate follows a day of `period_s` seconds, from `trough` of its mean up; bursts come at
    random and multiply it. Lengths are log-normal: half of them below the median, few many times
    longer.
    """

    duration_s: float = 600.0
    rate: float = 60.0  # requests per second, the mean without bursts
    period_s: float = 400.0
    trough: float = 0.3
    burst_every_s: float = 100.0
    burst_s: float = 20.0
    burst_factor: float = 3.0
    median_prompt: int = 600
    median_output: int = 180
    spread: float = 0.9  # sigma of the logarithm
    max_prompt: int = 6000
    max_output: int = 1800
    shared: float = 0.4  # share of requests that begin with one of the prefixes
    num_prefixes: int = 50
    prefix_tokens: int = 512


def generate(traffic: Traffic, seed: int) -> list[Arrival]:
    """A Poisson process of that rate (thinned), with lengths and prefixes."""
    rng = random.Random(seed)
    bursts = list(_bursts(traffic, rng))
    peak = traffic.rate * (2 - traffic.trough) * traffic.burst_factor
    weights = [1 / (rank + 1) for rank in range(traffic.num_prefixes)]  # few are popular
    arrivals = []
    now = rng.expovariate(peak)
    while now < traffic.duration_s:
        if rng.random() * peak < _rate(traffic, bursts, now):
            prefix = None
            if rng.random() < traffic.shared:
                (prefix,) = rng.choices(range(traffic.num_prefixes), weights)
            own = _length(rng, traffic.median_prompt, traffic.spread, traffic.max_prompt)
            shared = 0 if prefix is None else traffic.prefix_tokens
            output = _length(rng, traffic.median_output, traffic.spread, traffic.max_output)
            arrivals.append(Arrival(now, own + shared, output, prefix, shared))
        now += rng.expovariate(peak)
    return arrivals


def read_trace(path: Path) -> list[Arrival]:
    with path.open(newline="") as file:
        return [
            Arrival(
                float(row["arrival_s"]),
                int(row["prompt_tokens"]),
                int(row["output_tokens"]),
                int(row["prefix_id"]) if row["prefix_id"] else None,
                int(row["prefix_tokens"] or 0),
            )
            for row in csv.DictReader(file)
        ]


def _bursts(traffic: Traffic, rng: random.Random) -> Iterator[float]:
    start = rng.expovariate(1 / traffic.burst_every_s)
    while start < traffic.duration_s:
        yield start
        start += traffic.burst_s + rng.expovariate(1 / traffic.burst_every_s)


def _rate(traffic: Traffic, bursts: list[float], now: float) -> float:
    swing = 1 - (1 - traffic.trough) * math.cos(2 * math.pi * now / traffic.period_s)
    in_burst = any(start <= now < start + traffic.burst_s for start in bursts)
    return traffic.rate * swing * (traffic.burst_factor if in_burst else 1.0)


def _length(rng: random.Random, median: int, spread: float, most: int) -> int:
    return max(1, min(most, round(rng.lognormvariate(math.log(median), spread))))
