"""The short table at the end of a run."""

from benchmarks.gpu.bench import Report


def show(report: Report) -> None:
    print(report.keys())
