"""Metrics: what reaches Ray's exporter, and how often."""

import asyncio
from collections import defaultdict
from typing import Any, TypeAlias

import pytest
from ray.serve.metrics import Counter, Gauge, Histogram

from engine.outputs import EngineStats
from serve_app.metrics import Metrics

Recorded: TypeAlias = "dict[str, list[float]]"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """What histograms observe, by name."""
    values: Recorded = defaultdict(list)

    def observe(self: Histogram, value: float, tags: object = None) -> None:
        values[self.info["name"]].append(value)

    monkeypatch.setattr(Histogram, "observe", observe)
    return values


def test_gauges_are_kept_alive_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray exports only those set since its last export: an idle server would have none."""
    values: list[float] = []
    monkeypatch.setattr(Gauge, "set", lambda self, value, *args: values.append(value))
    monkeypatch.setattr("serve_app.metrics.REFRESH_S", 0.01)

    async def test() -> None:
        metrics = Metrics("tiny", 128)
        metrics._record()
        assert not values  # of an engine that is none of this replica's
        metrics.record_stats(EngineStats())
        await until(lambda: len(values) >= 3)
        assert set(values) == {0}
        metrics.record_stats(EngineStats(num_running=3, kv_cache_usage=0.5))
        await until(lambda: values.count(3) >= 2)
        assert values.count(0.5) >= 2

    asyncio.run(test())


def test_counters_go_on_when_another_engine_counts_from_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added: list[float] = []
    monkeypatch.setattr(Counter, "inc", lambda self, value=1, tags=None: added.append(value))

    async def test() -> None:
        metrics = Metrics("tiny", 128)
        metrics.record_stats(EngineStats(num_generation_tokens=5))
        metrics.record_recovery()
        metrics.record_stats(EngineStats(num_generation_tokens=3))
        await until(lambda: len(added) == 3)
        assert added == [5, 1, 3]

    asyncio.run(test())


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
