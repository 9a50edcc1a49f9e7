"""What every stage works with: its part of the report, its clock, timing and comparing.

Times are medians of CUDA-graph replays over inputs that rotate through four times the L2, on random
data. Outputs are poisoned with NaN before a check. In the interpreter a time is that of one call
and says nothing; what it shows is that the script works.
"""

import importlib
import itertools
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.plan import Plan

# Until the ceilings stage has measured them: an H200's copy bandwidth and bf16 matrix rate.
READ_TB_S, MATMUL_TFLOP_S = 4.3, 790.0

T = TypeVar("T")
Report = dict[str, Any]


class OutOfTimeError(Exception):
    """A stage used up its time; what it has measured so far stands."""


@dataclass
class Bench:
    """One stage at work."""

    plan: Plan
    report: Report
    section: Report  # the stage's own
    path: Path
    deadline: float  # time.monotonic()

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTimeError

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.report, indent=1))
        temporary.replace(self.path)

    def attempt(self, label: str, action: Callable[[], T]) -> T | None:
        """What the action returns, or None with its traceback in the report."""
        self.check_time()
        try:
            return action()
        except OutOfTimeError:
            raise
        except Exception as error:  # noqa: BLE001 - one failure must not cost the run's others
            self.section.setdefault("errors", {})[label] = traceback.format_exc()
            print(f"  FAILED {label}: {error!r}"[:300], flush=True)
            return None

    def peer(self, label: str, action: Callable[[], T]) -> T | None:
        """As `attempt`, but for what is not ours: where a peer fails, the run is still right."""
        self.check_time()
        try:
            return action()
        except OutOfTimeError:
            raise
        except Exception as error:  # noqa: BLE001 - peers raise what they like
            reason = f"{type(error).__name__}: {error}"[:300]
            self.section.setdefault("left out", {})[label] = reason
            print(f"  left out: {label}: {reason}"[:300], flush=True)
            return None

    def time_peer(
        self,
        label: str,
        calls: Sequence[Callable[[], Tensor]],
        expected: Tensor,
        floor_us: float,
    ) -> float | None:
        """Microseconds of a peer whose first rows are what is expected; None: it is left out."""

        def check_and_time() -> float:
            found = calls[-1]().reshape(-1, expected.shape[-1])[: len(expected)]
            error = worst_row_error(found, expected)
            if not error <= self.limit:
                raise ValueError(f"relative error {error:.1e}, allowed are {self.limit:.0e}")
            return self.measure(calls, floor_us)

        return self.peer(label, check_and_time)

    def check(self, label: str, error: float, limit: float) -> None:
        """Records an error against a reference; NaN is never within the limit."""
        self.section.setdefault("checks", {})[label] = {
            "error": error,
            "limit": limit,
            "ok": error <= limit,
        }
        if not error <= limit:
            print(f"  WRONG {label}: {error:.2e}, allowed are {limit:.0e}", flush=True)

    @property
    def limit(self) -> float:
        """Of a row's relative error: rounding inputs, weights and outputs to bf16 makes 0.4 %."""
        return 1e-2 if self.plan.dtype == torch.bfloat16 else 1e-4

    @property
    def read_rate(self) -> float:
        """Bytes per second that the GPU reads."""
        return float(self.report.get("ceilings", {}).get("read_tb_s", READ_TB_S)) * 1e12

    @property
    def matmul_rate(self) -> float:
        """FLOPs per second in bf16."""
        return float(self.report.get("ceilings", {}).get("matmul_tflop_s", MATMUL_TFLOP_S)) * 1e12

    def measure(self, calls: Sequence[Callable[[], object]], floor_us: float = 10.0) -> float:
        """Median microseconds of one call under graph replay, the calls taken in turn.

        A graph holds about 2 ms of work, judged by floor_us, so that starting it does not count.
        """
        if not self.plan.on_gpu:
            started = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - started) * 1e6
        for call in calls:
            call()
        rounds = max(1, round(min(256.0, 2000.0 / floor_us) / len(calls)))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        for _ in range(3):
            graph.replay()
        events = [_event() for _ in range(12)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
        return statistics.median(times) * 1e3 / (rounds * len(calls))

    def measure_queued(self, call: Callable[[], object], count: int = 40) -> float:
        """Microseconds of GPU time per call that cannot be captured, queued behind other work.

        The host has the 50 ms of that work to launch all calls. They are made once before: pinned
        memory is allocated for all of them then.
        """
        for _ in range(count if self.plan.on_gpu else 1):
            call()
        if not self.plan.on_gpu:
            return 0.0
        torch.cuda.synchronize()
        start, end = _event(), _event()
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call] # cycles
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / count

    def rotation(self, num_bytes: int) -> int:
        """How many copies of an input together pass four times the L2."""
        if not self.plan.on_gpu:
            return 2
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        return max(1, math.ceil(4 * l2 / num_bytes))

    def warm_up(self) -> None:
        """Half a second of matrix products: an idle card runs at a fraction of its clock."""
        if not self.plan.on_gpu:
            return
        a = torch.randn(4096, 4096, device=self.plan.device, dtype=torch.bfloat16)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it torch fills new tensors with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def worst_row_error(out: Tensor, reference: Tensor) -> float:
    """The largest relative error of a row; NaN where an element was not written."""
    assert out.shape == reference.shape, (out.shape, reference.shape)
    rows, expected = out.double().flatten(1), reference.double().flatten(1)
    norms = expected.norm(dim=1).clamp(min=1e-30)
    return float(((rows - expected).norm(dim=1) / norms).max())


def copies(x: Tensor, count: int) -> list[Tensor]:
    return list(x.expand(count, *x.shape).contiguous().unbind(0))


def run_stage(name: str, plan: Plan, path: Path, deadline: float) -> None:
    """A stage, a module of this package, in this process; its section says how it ended."""
    started = time.monotonic()
    report: Report = json.loads(path.read_text()) if path.exists() else {}
    section: Report = {"ended": "unfinished"}
    report[name] = section
    bench = Bench(plan, report, section, path, deadline)
    torch.set_float32_matmul_precision("highest")  # the references are float32
    torch.manual_seed(0)
    try:
        stage = importlib.import_module(f"benchmarks.gpu.{name}")
        with torch.inference_mode():
            stage.run(bench)
        section["ended"] = "complete"
    except OutOfTimeError:
        section["ended"] = "out of time"
    except Exception as error:  # noqa: BLE001 - the other stages are to run
        section["ended"] = "failed"
        section.setdefault("errors", {})["stage"] = traceback.format_exc()
        print(f"  FAILED: {error!r}"[:300], file=sys.stdout, flush=True)
    section["seconds"] = round(time.monotonic() - started, 1)
    bench.save()
