"""How many replicas a load asks for, and what Serve's delays make of it."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

import serve_app.autoscaling
from engine.errors import ConfigError
from engine.outputs import EngineStats
from serve_app.autoscaling import (
    LEAST_SHARE,
    QueueDepthPolicy,
    QueueDepthSettings,
    ReplicaLoad,
    desired_replicas,
    latest_loads,
)
from serve_app.autoscaling_stats import LoadMeter
from serve_app.launch_plan import make_plan
from serve_app.replica_count import AUTOSCALING
from serve_app.serve_schema import to_schema

SETTINGS = QueueDepthSettings(utilization=0.7, drain_s=10.0)
IDLE = ReplicaLoad(running=0, waiting=0, waiting_tokens=0, slots=4, arrived_per_s=0.0)


def load(running: float, waiting: float = 0, **values: float) -> ReplicaLoad:
    return replace(IDLE, running=running, waiting=waiting, **values)


def desired(*loads: ReplicaLoad, target: int | None = None, **more: Any) -> int:
    target = len(loads) if target is None else target
    return desired_replicas(loads, more.pop("settings", SETTINGS), target=target, **more)


# -- the function -------------------------------------------------------------------------------

AMOUNT = st.integers(0, 300)
LOAD = st.builds(
    lambda slots, busy, waiting, tokens, arrived, drained, prompt: ReplicaLoad(
        running=round(slots * busy),
        waiting=waiting,
        waiting_tokens=waiting * tokens,
        slots=slots,
        arrived_per_s=arrived,
        drained_per_s=drained,
        drained_tokens_per_s=drained * prompt,
    ),
    slots=st.integers(1, 256),
    busy=st.floats(0, 1),
    waiting=AMOUNT,
    tokens=st.integers(1, 5000),
    arrived=st.floats(0, 100),
    drained=st.floats(0, 100),
    prompt=st.floats(0, 5000),
)
LOADS = st.lists(LOAD, min_size=1, max_size=5)
TARGET = st.integers(1, 20)


@given(LOADS, TARGET, AMOUNT, st.booleans())
def test_constant_load_moves_the_target_once(
    loads: list[ReplicaLoad], target: int, held: int, loading: bool
) -> None:
    """Whatever was decided is decided again: no flapping, and no climb while replicas load."""
    first = desired_replicas(loads, SETTINGS, target=target, held=held, loading=loading)
    again = desired_replicas(loads, SETTINGS, target=first, held=held, loading=loading)
    assert again == first
    assert desired_replicas(loads, SETTINGS, target=first, held=held, loading=True) <= first


@given(LOADS, TARGET, AMOUNT, st.booleans(), st.integers(1, 50))
def test_more_load_never_asks_for_fewer(
    loads: list[ReplicaLoad], target: int, held: int, loading: bool, added: int
) -> None:
    number = desired_replicas(loads, SETTINGS, target=target, held=held, loading=loading)
    first = loads[0]
    busier = replace(first, waiting=first.waiting + added)
    more = replace(first, arrived_per_s=first.arrived_per_s + added)
    for others in ([busier, *loads[1:]], [more, *loads[1:]]):
        assert number <= desired_replicas(
            others, SETTINGS, target=target, held=held, loading=loading
        )
    assert number <= desired_replicas(
        loads, SETTINGS, target=target, held=held + added, loading=loading
    )


@given(LOADS, TARGET, st.booleans())
def test_what_is_open_bounds_the_number(
    loads: list[ReplicaLoad], target: int, loading: bool
) -> None:
    """None for nothing, and no more than use an eighth of their slots."""
    number = desired_replicas(loads, SETTINGS, target=target, loading=loading)
    num_open = sum(each.running + each.waiting for each in loads)
    slots = sum(each.slots for each in loads) / len(loads)
    assert number <= math.ceil(num_open / max(1.0, LEAST_SHARE * slots))
    if not any(each.drained_per_s for each in loads):
        assert (number > 0) == (num_open > 0)


@given(LOADS, st.booleans(), st.floats(1.0, 50.0))
def test_patience_never_asks_for_more(
    loads: list[ReplicaLoad], loading: bool, longer: float
) -> None:
    patient = replace(SETTINGS, drain_s=SETTINGS.drain_s * longer)
    assert desired_replicas(loads, patient, target=1, loading=loading) <= desired_replicas(
        loads, SETTINGS, target=1, loading=loading
    )


def test_before_anything_is_measured_open_sequences_are_counted_against_slots() -> None:
    assert desired(load(4, 20)) == 6
    assert desired(load(4, 20), held=8) == 8
    assert desired(load(4, 20), load(4, 20)) == 12
    assert desired(IDLE, IDLE) == 0
    large = [load(each, slots=256) for each in (30, 20, 10)]
    assert desired(*large) == 2  # who knows what a slot is good for


def test_what_arrives_is_counted_against_what_a_replica_drains() -> None:
    full = load(4, 20, arrived_per_s=34, drained_per_s=10)
    assert desired(full) == 5  # 34 / 8.5, and a fifth of a replica for the queue
    assert desired(full, loading=True) == 4  # what comes takes care of that
    assert desired(*[load(4, arrived_per_s=8, drained_per_s=10)] * 2) == 2  # 80 %
    assert desired(*[load(4, arrived_per_s=9, drained_per_s=10)] * 2) == 3
    assert desired(*[load(3, arrived_per_s=5, drained_per_s=10)] * 3) == 3  # 75 % of two
    assert desired(*[load(3, arrived_per_s=4, drained_per_s=10)] * 3) == 2


def test_the_fastest_replica_shows_what_each_can_drain() -> None:
    fast, filled = load(4, 9, drained_per_s=10), load(4, 9, drained_per_s=0.1)
    assert desired(replace(fast, arrived_per_s=17), filled) == 3
    assert desired(filled, replace(fast, arrived_per_s=17)) == 3


def test_long_prompts_count_for_more_than_one() -> None:
    values = {"arrived_per_s": 8, "drained_per_s": 10, "drained_tokens_per_s": 1000}
    assert desired(load(4, 5, waiting_tokens=500, **values)) == 1
    assert desired(load(4, 5, waiting_tokens=50_000, **values)) == 6


def test_too_many_are_too_many_whatever_was_measured() -> None:
    """A mix of long requests that is gone, or a replica measured as it had just filled."""
    values = {"slots": 256, "arrived_per_s": 10, "drained_per_s": 0.5}
    assert desired(load(40, **values)) == 2


def test_replicas_that_load_count() -> None:
    assert desired(load(4, 20), target=6, loading=True) == 6
    assert desired(target=3, held=5) == 3  # the first ones load
    assert desired(target=0, held=5) == 1  # Serve wakes the first one itself
    assert desired(target=0) == 0


# -- the policy in Serve's hands ----------------------------------------------------------------


class Controller:
    """Serve's loop: the policy, then Serve's own delays and bounds, every 0.1 s."""

    def __init__(self, **scaling: Any) -> None:
        values = {**AUTOSCALING, "min_replicas": 0, "max_replicas": 8, **scaling}
        self.config = AutoscalingConfig(**values)
        policy: Any = self.config.policy.get_policy()  # pickled by value, as the controller gets it
        self.policy: QueueDepthPolicy = policy(**self.config.policy.policy_kwargs)
        self.now = 1000.0
        self.target = 1
        self._state: dict[str, Any] = {}

    def run(self, seconds: float, share: Callable[[int], ReplicaLoad], running: int) -> list[int]:
        """The targets meanwhile, with `running` replicas that report `share(target)`."""
        targets = []
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1
            number, _ = self.policy(self._context(share(self.target), running))
            number, self._state = _apply_delay_logic(
                number, self.target, self.config, self._state, self.now
            )
            bounds = self.config.min_replicas, self.config.max_replicas
            self.target = max(bounds[0], min(bounds[1], number))
            targets.append(self.target)
        return targets

    def _context(self, share: ReplicaLoad, running: int) -> Any:
        metrics = {
            name: {index: [SimpleNamespace(value=value)] for index in range(running)}
            for name, value in vars(share).items()
        }
        return SimpleNamespace(
            current_time=self.now,
            current_num_replicas=running,
            target_num_replicas=self.target,
            total_queued_requests=0.0,
            raw_metrics=metrics,
            config=self.config,
        )


def test_up_at_once_and_not_again_while_they_load() -> None:
    controller = Controller()
    assert set(controller.run(5, lambda _: load(4, 16), running=1)) == {5}
    assert controller.run(1, lambda _: load(4, 60), running=1)[-1] == 8  # the bound


def test_a_lull_does_not_decide_a_scale_down() -> None:
    controller = Controller(downscale_delay_s=10)
    controller.run(1, lambda _: load(4, 16), running=1)
    needs_four = load(1, arrived_per_s=2.5, drained_per_s=5)
    assert set(controller.run(5, lambda _: needs_four, running=5)) == {5}
    assert set(controller.run(4, lambda _: IDLE, running=5)) == {5}
    assert controller.run(1.5, lambda _: needs_four, running=5)[-1] == 4


def test_load_that_comes_and_goes_within_the_delay_keeps_its_replicas() -> None:
    controller = Controller(downscale_delay_s=10)
    controller.run(1, lambda _: load(4, 16), running=1)
    for _ in range(5):
        assert set(controller.run(8, lambda _: IDLE, running=5)) == {5}
        assert set(controller.run(1, lambda target: load(20 / target), running=5)) == {5}


def test_to_zero_after_its_delay() -> None:
    controller = Controller(downscale_delay_s=1, downscale_to_zero_delay_s=4)
    controller.run(1, lambda _: load(4, 16), running=1)
    targets = controller.run(10, lambda _: IDLE, running=5)
    assert sorted(set(targets), reverse=True) == [5, 1, 0]
    assert 38 <= targets.count(1) <= 42


def test_metrics_of_a_replica_that_has_not_reported_all_are_left_out() -> None:
    point = [SimpleNamespace(value=9.0), SimpleNamespace(value=1.0)]
    metrics: Any = {name: {"a": point, "b": []} for name in vars(IDLE)}
    assert latest_loads(metrics) == [ReplicaLoad(**dict.fromkeys(vars(IDLE), 1.0))]
    assert latest_loads({"running": {"a": point}}) == []


def test_the_controller_imports_nothing_of_ours() -> None:
    source = Path(serve_app.autoscaling.__file__).read_text()
    assert not re.search(r"^\s*(from|import) (engine|kernels|serve_app)", source, re.MULTILINE)


# -- what a replica reports ---------------------------------------------------------------------


def test_a_meter_measures_what_arrives_and_what_ends_while_sequences_wait() -> None:
    meter = LoadMeter(slots=4)
    for step in range(1, 301):
        stats = EngineStats(
            num_running=4,
            num_waiting=step,
            num_waiting_tokens=20 * step,
            oldest_waiting_s=0.7,
            num_arrived=3 * step,
            num_admitted=2 * step,
            num_prompt_tokens=40 * step,
            num_steps=step,
        )
        read = meter.read(stats, step + 6, now=50 + step / 10)
        if step == 15:
            assert (read.drained_per_s, read.drained_tokens_per_s) == (0, 0)  # too early to tell
    assert read.drained_per_s == pytest.approx(20)
    assert read.drained_tokens_per_s == pytest.approx(400)
    assert read.arrived_per_s == pytest.approx(30, rel=0.01)
    assert (read.running, read.waiting, read.waiting_tokens, read.slots) == (4, 302, 6000, 4)
    # Idle for a minute, then another engine, which counts from zero: what was measured holds.
    assert meter.read(EngineStats(num_steps=400), 0, 140.0).drained_per_s == read.drained_per_s
    another = meter.read(EngineStats(num_steps=1, num_waiting=3, oldest_waiting_s=1), 0, 140.1)
    assert another.drained_per_s == read.drained_per_s
    assert meter.read(EngineStats(num_steps=2), 0, 900.0).drained_per_s == 0  # too long ago


def test_a_meter_ignores_slots_that_fill() -> None:
    meter = LoadMeter(slots=256)
    for step in range(1, 41):
        stats = EngineStats(
            num_running=6 * step,
            num_waiting=10,
            oldest_waiting_s=0.7,
            num_admitted=7 * step,
            num_steps=step,
        )
        read = meter.read(stats, 300, now=step / 10)
    assert read.drained_per_s == pytest.approx(10)


# -- settings -----------------------------------------------------------------------------------


def test_the_example_in_serve_config_is_what_max_replicas_does() -> None:
    text = (Path(serve_app.__file__).parent / "serve_config.yaml").read_text()
    example = re.search(r"^    # deployments:.*\Z", text, re.MULTILINE | re.DOTALL)
    assert example is not None
    uncommented = yaml.safe_load(re.sub(r"^    # ?", "", example[0], flags=re.MULTILINE))
    (deployment,) = uncommented["deployments"]
    settings = deployment["autoscaling_config"]["policy"].pop("policy_kwargs")
    assert QueueDepthSettings(**settings) == QueueDepthSettings()
    plan = make_plan(max_replicas=3)
    (made,) = plan.serve_config["applications"][0]["deployments"]
    assert made["autoscaling_config"] == deployment["autoscaling_config"]
    assert plan.num_replicas == 3
    to_schema(plan.serve_config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_replicas": 2, "max_replicas": 3}, "--num-replicas 2 fixes .* --max-replicas 3"),
        ({"num_replicas": 2, "min_replicas": 0}, "--num-replicas 2 fixes .* --min-replicas 0"),
        ({"min_replicas": 0}, "--min-replicas 0 needs --max-replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "--min-replicas is 3 and --max-replicas is 2"),
    ],
)
def test_contradictions_are_refused_by_name(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_plan(**options)


def test_options_win_over_the_file_s_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_plan(max_replicas=4).serve_config
    (deployment,) = config["applications"][0]["deployments"]
    deployment["autoscaling_config"] |= {"downscale_delay_s": 5, "initial_replicas": 2}
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    plan = make_plan(min_replicas=0, max_replicas=1)
    (deployment,) = plan.serve_config["applications"][0]["deployments"]
    scaling = deployment["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], plan.num_replicas) == (0, 1, 1)
    assert scaling["downscale_delay_s"] == 5
    deployment["autoscaling_config"] |= {"min_replicas": 0, "initial_replicas": 0}
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(plan.serve_config))
    (deployment,) = make_plan().serve_config["applications"][0]["deployments"]
    assert deployment["autoscaling_config"]["initial_replicas"] == 1
    with pytest.raises(ConfigError, match=r"which autoscaling_config in .* scales"):
        make_plan(num_replicas=2)
