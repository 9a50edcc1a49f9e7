"""Replicas that follow the load: 1 → 3 → 1 → 0 → 1, with the times of each reaction.

    python -m benchmarks.autoscaling [--proxy haproxy|default] [--quick]

The demo model with few slots, so that requests queue, under `manta serve`'s own launcher, HAProxy
or Ray's default proxy in front. Load generator, Ray and replicas share the machine. Writes the
plot benchmarks/results/autoscaling.svg.
"""

import argparse
import asyncio
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load import Connection, chat_body
from benchmarks.plots import save_plot
from benchmarks.record import Table, save, show
from benchmarks.stub_server import DEFAULT_PROXY
from engine.errors import MantaError
from serve_app import launch_env
from serve_app.launch_plan import LaunchPlan, make_plan
from serve_app.ports import free_ports
from serve_app.processes import Guard

MODEL_NAME = "bench"
SLOTS = 4  # max_num_seqs: the fifth request waits
LIGHT, HEAVY = 2, 24  # requests open at once
ANSWER_TOKENS = 64
# Serve's delays, short enough for a run of two minutes; serve_config.yaml has longer ones.
DOWN_S, TO_ZERO_S = 4.0, 4.0
SAMPLE_S = 0.05
START_S = 240.0
GOALS = {"decision": 0.5, "from zero": 4.0}


@dataclass(slots=True)
class Timeline:
    """What was seen, in seconds since the first sample."""

    started: float = field(default_factory=time.monotonic)
    times: list[float] = field(default_factory=list)
    target: list[int] = field(default_factory=list)  # replicas that run or start
    running: list[int] = field(default_factory=list)
    gone: list[bool] = field(default_factory=list)  # not even one that drains is left
    waiting: list[int] = field(default_factory=list)  # requests without a token yet
    first_tokens: list[tuple[float, float]] = field(default_factory=list)  # sent, took
    events: list[tuple[float, str]] = field(default_factory=list)
    num_open: int = 0
    num_done: int = 0
    errors: list[str] = field(default_factory=list)

    def now(self) -> float:
        return time.monotonic() - self.started

    def mark(self, event: str) -> float:
        self.events.append((self.now(), event))
        return self.events[-1][0]

    def first(self, values: list[int], after: float, least: int, most: int) -> float:
        """Seconds from `after` until a value lay within the bounds; NaN if it never did."""
        for seconds, value in zip(self.times, values, strict=True):
            if seconds >= after and least <= value <= most:
                return seconds - after
        return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling")
    parser.add_argument("--proxy", choices=["haproxy", "default"], default="haproxy")
    parser.add_argument("--quick", action="store_true", help="shorter phases, nothing written")
    args = parser.parse_args()
    if args.proxy == "default":
        os.environ.update(DEFAULT_PROXY)
    timeline = Timeline()
    with Guard() as guard:
        launch_env.set_local_defaults(os.environ, guard.run_dir, verbose=False)
        from serve_app import launch

        plan = scaled_plan()
        load = threading.Thread(target=_drive, args=[plan, timeline, args.quick], daemon=True)
        load.start()
        started = time.monotonic()
        launch.run(plan, address=None, dashboard=False, verbose=False, started=started)
        load.join()
    tables = [_reactions(timeline, args.proxy)]
    show(tables[0])
    if timeline.errors:
        print(f"{len(timeline.errors)} failed requests, the first: {timeline.errors[0]}")
    if not args.quick:
        name = "autoscaling" if args.proxy == "haproxy" else "autoscaling_default_proxy"
        title = "Autoscaling" + (", Ray's default proxy" if args.proxy == "default" else "")
        print(save_plot(name, lambda figure: _plot(figure, timeline)))
        print(save(name, title, tables))


def scaled_plan() -> LaunchPlan:
    """The plan of `manta serve --min-replicas 0 --max-replicas 3` with short delays."""
    plan = make_plan(
        port=free_ports(1)[0],
        model_name=MODEL_NAME,
        max_num_seqs=SLOTS,
        min_replicas=0,
        max_replicas=3,
    )
    (app,) = plan.serve_config["applications"]
    app["deployments"][0]["autoscaling_config"] |= {
        "downscale_delay_s": DOWN_S,
        "downscale_to_zero_delay_s": TO_ZERO_S,
    }
    return plan


def _drive(plan: LaunchPlan, timeline: Timeline, quick: bool) -> None:
    """Load and samples, from the first answer on; then the server's end, whatever happened."""
    try:
        asyncio.run(_phases(f"http://{plan.host}:{plan.port}", plan.app_name, timeline, quick))
    finally:
        os.kill(os.getpid(), signal.SIGINT)


async def _phases(url: str, app_name: str, timeline: Timeline, quick: bool) -> None:
    async with asyncio.timeout(START_S):
        while not await _answers(url):
            await asyncio.sleep(0.2)
    timeline.started = time.monotonic()
    sampling = asyncio.create_task(_sample(app_name, timeline))
    seconds = 4.0 if quick else 15.0
    timeline.mark(f"{LIGHT} requests")
    await _load(url, timeline, LIGHT, seconds)
    timeline.mark(f"{HEAVY} requests")
    await _load(url, timeline, HEAVY, 2 * seconds)
    timeline.mark(f"{LIGHT} requests again")
    await _load(url, timeline, LIGHT, DOWN_S + seconds)
    for _ in range(1 if quick else 3):
        timeline.mark("none")
        await _until(lambda: timeline.gone[-1])
        timeline.mark("one request")
        await _load(url, timeline, 1, 1.0)
    sampling.cancel()


async def _load(url: str, timeline: Timeline, at_once: int, seconds: float) -> None:
    """So many requests open all the time, each client sending its next when one ends."""
    until = time.monotonic() + seconds
    await asyncio.gather(*[_client(url, timeline, until) for _ in range(at_once)])


async def _client(url: str, timeline: Timeline, until: float) -> None:
    connection = Connection(url)
    body = chat_body(MODEL_NAME, ANSWER_TOKENS, stream=True)
    while True:
        sent = timeline.now()
        timeline.num_open += 1
        try:
            reply = await connection.post("/v1/chat/completions", body)
            assert reply.num_tokens == ANSWER_TOKENS, f"{reply.num_tokens} tokens came"
            timeline.first_tokens.append((sent, reply.first))
            timeline.num_done += 1
        except (OSError, EOFError, RuntimeError, AssertionError) as error:
            timeline.errors.append(f"at {sent:.1f} s: {error!r}")
        timeline.num_open -= 1
        if time.monotonic() >= until:
            connection.close()
            return


async def _answers(url: str) -> bool:
    connection = Connection(url)
    try:
        body = chat_body(MODEL_NAME, 1, stream=False)
        return (await connection.post("/v1/chat/completions", body)).status == 200
    except (OSError, EOFError, RuntimeError):
        return False
    finally:
        connection.close()


async def _until(reached: Any) -> None:
    async with asyncio.timeout(60):
        while not reached():
            await asyncio.sleep(SAMPLE_S)


async def _sample(app_name: str, timeline: Timeline) -> None:
    from ray import serve

    while True:
        status = await asyncio.to_thread(serve.status)
        ((_, deployment),) = status.applications[app_name].deployments.items()
        states = {str(state): count for state, count in deployment.replica_states.items()}
        running = states.get("RUNNING", 0)
        timeline.times.append(timeline.now())
        timeline.running.append(running)
        timeline.target.append(running + states.get("STARTING", 0))
        timeline.gone.append(not sum(states.values()))
        timeline.waiting.append(max(0, timeline.num_open - SLOTS * running))
        await asyncio.sleep(SAMPLE_S)


def _reactions(timeline: Timeline, proxy: str) -> Table:
    marks = dict(reversed([(event, seconds) for seconds, event in timeline.events]))
    heavy, light = marks[f"{HEAVY} requests"], marks[f"{LIGHT} requests again"]
    none = marks["none"]
    wakes = [seconds for seconds, event in timeline.events if event == "one request"]
    first = [min(took for sent, took in timeline.first_tokens if sent >= at) for at in wakes]
    rows: list[list[str | float]] = [
        ["3 replicas decided, s", timeline.first(timeline.target, heavy, 3, 3), "≤ 0.5"],
        ["3 replicas running, s", timeline.first(timeline.running, heavy, 3, 3), ""],
        ["back to 1, s", timeline.first(timeline.running, light, 0, 1), f"{DOWN_S:g} + stop"],
        ["to 0, s", timeline.first(timeline.running, none, 0, 0), f"{TO_ZERO_S:g} + stop"],
        [f"from 0 to a token, s, worst of {len(first)}", max(first), "≤ 4"],
        ["requests answered", timeline.num_done, ""],
        ["requests failed", len(timeline.errors), "0"],
    ]
    name = {"haproxy": "HAProxy", "default": "Ray's default proxy"}[proxy]
    return Table(
        title=f"{LIGHT} → {HEAVY} → {LIGHT} → 0 → 1 requests at once, {name}",
        columns=["reaction", "seen", "goal"],
        rows=rows,
        notes=[
            f"Demo model, {SLOTS} slots a replica, 0 to 3 replicas; Serve's delays are "
            f"{DOWN_S:g} s down and {TO_ZERO_S:g} s to zero. Seen by asking Serve every "
            f"{SAMPLE_S * 1000:.0f} ms. From zero: Serve's decision, the processes' start and the "
            "weights' mapping, on a machine all of them share.",
            f"![Replicas and queue over time](../benchmarks/results/{_plot_name(proxy)}.svg)",
        ],
    )


def _plot_name(proxy: str) -> str:
    return "autoscaling" if proxy == "haproxy" else "autoscaling_default_proxy"


def _plot(figure: Any, timeline: Timeline) -> None:
    replicas, queue = figure.subplots(2, 1, sharex=True)
    replicas.step(timeline.times, timeline.target, where="post", label="decided")
    replicas.step(timeline.times, timeline.running, where="post", label="running")
    replicas.set_ylabel("replicas")
    replicas.set_yticks(range(4))
    replicas.legend(loc="upper right")
    queue.step(timeline.times, timeline.waiting, where="post", color="tab:red")
    queue.set_ylabel("requests beyond the slots")
    queue.set_xlabel("seconds")
    for seconds, event in timeline.events:
        for axes in (replicas, queue):
            axes.axvline(seconds, color="0.8", linewidth=0.8, zorder=0)
        queue.annotate(event, (seconds, max(timeline.waiting)), fontsize=7, rotation=90, va="top")


if __name__ == "__main__":
    try:
        main()
    except MantaError as error:
        sys.exit(str(error))
