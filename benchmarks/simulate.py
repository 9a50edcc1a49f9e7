"""Which autoscaling settings serve how well at what cost, for fleets we do not have.

    python -m benchmarks.simulate                      the settings below, and fixed numbers
    python -m benchmarks.simulate --trace FILE.csv     on recorded traffic (benchmarks/traffic.py)
    python -m benchmarks.simulate --large              one run of several hundred replicas

The real scheduler, meter and policy over a formula of a GPU: benchmarks/simulated_fleet.py says
what is real. Writes results/simulate.json and plots of the trade-off and of one
run. No Ray process is started.
"""

import argparse
import itertools
import math
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plots import save_plot
from benchmarks.record import Table, save, show
from benchmarks.simulated_fleet import Fleet, Outcome, Slo
from benchmarks.simulated_replica import Gpu
from benchmarks.simulated_router import Router
from benchmarks.traffic import Arrival, Traffic, generate, read_trace
from serve_app.replica_count import AUTOSCALING

SLO = Slo()
SEEDS = (11, 12, 13)  # not those the policy was written with
QUANTUM, LARGE_QUANTUM = 16, 64  # simulated_replica: how coarse a step is
TRAFFIC = Traffic(duration_s=600.0, rate=30.0, period_s=600.0, burst_every_s=150.0, burst_s=45.0)
LARGE = replace(TRAFFIC, duration_s=60.0, rate=3000.0, period_s=120.0, burst_every_s=40.0)
START_S = 15.0  # a GPU's replica on a warm node
MAX_REPLICAS = 64
COLUMNS = [
    "settings",
    "SLO met, %",
    "goodput, requests/s",
    "TTFT p50, s",
    "TTFT p99, s",
    "prompt tokens cached, %",
    "replica seconds per million tokens",
    "replicas, mean",
    "replicas, most",
]


@dataclass(frozen=True)
class Case:
    """A name in the table, and what differs from `manta serve --max-replicas`."""

    name: str
    scaling: dict[str, Any]
    policy: dict[str, Any]
    start_s: float = START_S
    cache_aware_routing: bool = False

    def fleet(self, quantum: int) -> Fleet:
        bounds = {"min_replicas": 1, "max_replicas": MAX_REPLICAS, "initial_replicas": 2}
        policy = AUTOSCALING["policy"] | {"policy_kwargs": self.policy}
        scaling = AUTOSCALING | bounds | self.scaling | {"policy": policy}
        router = Router(quantum, seed=0) if self.cache_aware_routing else None
        return Fleet(scaling, gpu=Gpu(), quantum=quantum, start_s=self.start_s, router=router)


def fixed(number: int) -> Case:
    bounds = dict.fromkeys(("min_replicas", "initial_replicas", "max_replicas"), number)
    return Case(f"{number} replicas, fixed", bounds, {})


CASES = [
    Case("defaults", {}, {}),
    Case("defaults, cache-aware routing", {}, {}, cache_aware_routing=True),
    *[Case(f"utilization {share}", {}, {"utilization": share}) for share in (0.5, 0.9)],
    *[Case(f"drain_s {seconds:g}", {}, {"drain_s": seconds}) for seconds in (2.0, 30.0)],
    *[Case(f"downscale_delay_s {s}", {"downscale_delay_s": s}, {}) for s in (10, 30, 120)],
    *[Case(f"replicas start in {s:g} s", {}, {}, s) for s in (4.0, 60.0)],
    *[fixed(number) for number in (3, 4, 6, 8)],
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate")
    parser.add_argument("--trace", type=Path, help="recorded traffic instead of generated")
    parser.add_argument("--large", action="store_true", help="one run of hundreds of replicas")
    parser.add_argument("--quick", action="store_true", help="the defaults only, nothing written")
    args = parser.parse_args()
    if args.large:
        tables = [_large()]
    else:
        tables = [_sweep(args.trace, CASES[:1] if args.quick else CASES, write=not args.quick)]
    for table in tables:
        show(table)
    if not args.quick:
        print(save("simulate_large" if args.large else "simulate", "Simulated fleets", tables))


def simulate(case: Case, arrivals: Sequence[Arrival], quantum: int = QUANTUM) -> Outcome:
    warnings.simplefilter("ignore", DeprecationWarning)  # Serve's, of its own field
    return case.fleet(quantum).run(arrivals)


def _sweep(trace: Path | None, cases: list[Case], *, write: bool) -> Table:
    traffics = [read_trace(trace)] if trace else [generate(TRAFFIC, seed) for seed in SEEDS]
    started = time.perf_counter()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = [list(pool.map(partial(simulate, case), traffics)) for case in cases]
    rows: list[list[str | float]] = [
        [case.name, *_figures(outcomes)] for case, outcomes in zip(cases, runs, strict=True)
    ]
    if write:
        save_plot("simulate", lambda figure: _plot_trade_off(figure, rows))
        save_plot("simulate_run", lambda figure: _plot_run(figure, runs[0][0]))
    return Table(
        title=f"Recorded traffic {trace}" if trace else "Bursts on a swinging load",
        columns=COLUMNS,
        rows=rows,
        notes=[
            f"{sum(map(len, traffics)):,} requests in {len(traffics)} runs of each row; "
            f"{time.perf_counter() - started:.0f} s for all. The SLO is a first token within "
            f"{SLO.first_token_s:g} s and {SLO.token_s * 1000:g} ms a token, and what was promised "
            f"counts as goodput. Replicas start in {START_S:g} s; steps of {QUANTUM} tokens.",
            "![Trade-off](../benchmarks/results/simulate.svg) "
            "![Replicas over time](../benchmarks/results/simulate_run.svg)",
        ],
    )


def _large() -> Table:
    bounds = {"max_replicas": 1000, "initial_replicas": 250, "metrics_interval_s": 1.0}
    case = Case("defaults, up to 1000", bounds | {"look_back_period_s": 2.0}, {})
    arrivals = generate(LARGE, SEEDS[0])
    started = time.perf_counter()
    outcome = simulate(case, arrivals, LARGE_QUANTUM)
    return Table(
        title="Hundreds of replicas",
        columns=COLUMNS,
        rows=[[case.name, *_figures([outcome])]],
        notes=[
            f"{len(arrivals):,} requests in {outcome.seconds:.0f} s, simulated in "
            f"{time.perf_counter() - started:.0f} s; steps of {LARGE_QUANTUM} tokens."
        ],
    )


def _figures(outcomes: list[Outcome]) -> list[float]:
    """What the columns say, over all runs of a case."""
    requests = [request for outcome in outcomes for request in outcome.requests]
    met = sum(map(SLO.met, requests))
    seconds = sum(outcome.seconds for outcome in outcomes)
    waits = sorted(request.first_token - request.arrival.time for request in requests)
    served = [request for request in requests if math.isfinite(request.end)]
    tokens = sum(request.arrival.output_tokens for request in served)
    replica_seconds = sum(outcome.replica_seconds for outcome in outcomes)
    return [
        100 * met / len(requests),
        met / seconds,
        statistics.median(waits),
        waits[len(waits) * 99 // 100],
        100 * statistics.mean(outcome.cached for outcome in outcomes),
        replica_seconds / tokens * 1e6,
        replica_seconds / seconds,
        max(sample[1] for outcome in outcomes for sample in outcome.samples),
    ]


def _plot_trade_off(figure: Any, rows: list[list[str | float]]) -> None:
    axes = figure.subplots()
    for (name, met, *others), marker in zip(rows, itertools.cycle("osD^v<>P*Xph"), strict=False):
        color = "black" if "fixed" in str(name) else None  # None: the next of the cycle
        axes.scatter(others[4], met, color=color, marker=marker, s=50, label=name)
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set_xlabel("replica seconds per million tokens")
    axes.set_ylabel("requests within the SLO, %")


def _plot_run(figure: Any, outcome: Outcome) -> None:
    replicas, requests = figure.subplots(2, 1, sharex=True)
    times, decided, running, num_open = zip(*outcome.samples, strict=True)
    replicas.step(times, decided, where="post", label="decided")
    replicas.step(times, running, where="post", label="running")
    replicas.set_ylabel("replicas")
    replicas.legend(loc="upper right")
    requests.step(times, num_open, where="post", color="tab:red")
    requests.set_ylabel("requests open")
    requests.set_xlabel("seconds")


if __name__ == "__main__":
    main()
