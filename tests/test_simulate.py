"""The simulated fleet: nothing is lost, coarse steps tell what fine ones do, load is followed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulate import SLO, Case, fixed, simulate
from benchmarks.simulated_replica import Gpu
from benchmarks.traffic import Arrival, Traffic, generate, read_trace

TRAFFIC = Traffic(duration_s=20.0, rate=12.0, burst_every_s=8.0, burst_s=4.0)


def run(case: Case, quantum: int) -> tuple[list[Any], float]:
    outcome = simulate(case, generate(TRAFFIC, 3), quantum)
    return outcome.requests, outcome.replica_seconds / outcome.seconds


def test_every_request_ends_and_a_fixed_number_stays() -> None:
    requests, replicas = run(fixed(2), 16)
    assert all(r.arrival.time < r.first_token <= r.end < math.inf for r in requests)
    assert replicas == pytest.approx(2)
    assert len({request.arrival.time for request in requests}) == len(requests) > 100


def test_coarse_steps_tell_what_fine_ones_do() -> None:
    fine, coarse = (run(fixed(1), quantum)[0] for quantum in (2, 16))
    mean = [sum(r.end - r.arrival.time for r in each) / len(each) for each in (fine, coarse)]
    assert mean[1] == pytest.approx(mean[0], rel=0.15)


def test_replicas_follow_a_burst_and_leave_after_it() -> None:
    burst = [Arrival(5 + i / 200, 800, 300) for i in range(4000)]
    quiet = [Arrival(80.0 + i, 800, 300) for i in range(60)]
    outcome = simulate(Case("x", {"initial_replicas": 1}, {}, start_s=4.0), [*burst, *quiet], 32)
    targets = {second: decided for second, decided, _, _ in outcome.samples}
    assert max(targets.values()) > 4
    assert list(targets.values())[-1] == 1
    assert sum(SLO.met(request) for request in outcome.requests[-30:]) == 30


def test_routing_keeps_equal_beginnings_together() -> None:
    """Every beginning comes twice: by chance one in three meets the other."""
    arrivals = [Arrival(i / 20, 1100, 20, i % 151, 1024) for i in range(302)]
    apart = simulate(fixed(3), arrivals, 16)
    together = simulate(replace(fixed(3), cache_aware_routing=True), arrivals, 16)
    assert apart.cached < 0.3 < 0.4 < together.cached
    assert all(SLO.met(request) for request in together.requests)


def test_from_none_the_first_request_waits_for_a_replica() -> None:
    case = Case("x", {"min_replicas": 0, "initial_replicas": 0}, {}, start_s=3.0)
    (request,) = simulate(case, [Arrival(1.0, 100, 10)], 1).requests
    assert 3.0 < request.first_token - 1.0 < 3.3


def test_a_step_takes_what_the_roofline_says() -> None:
    """One sequence with 1,024 tokens of context: 1.11 ms at the bounds of an H200."""
    gpu = Gpu(efficiency=1.0, host_ms=0.0)
    assert gpu.seconds(1, 1, 1024) == pytest.approx(1.11e-3, rel=0.01)
    assert gpu.seconds(1, 64, 64 * 1024) == pytest.approx(3.37e-3, rel=0.01)
    assert gpu.seconds(10, 10, 10240) == pytest.approx(11.1e-3, rel=0.01)


def test_a_trace_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens,prefix_id,prefix_tokens\n0.5,100,20,,\n1,90,5,7,64\n"
    )
    assert read_trace(path) == [Arrival(0.5, 100, 20), Arrival(1.0, 90, 5, 7, 64)]
