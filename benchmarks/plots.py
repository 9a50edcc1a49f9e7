"""Plots beside the records: SVG files in benchmarks/results, drawn by matplotlib if it is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

SIZE = (9.0, 5.0)  # inches


def save_plot(name: str, draw: Callable[[Any], None]) -> Path | None:
    """Write results/NAME.svg; None without matplotlib. `draw` gets an empty figure."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return None
    mpl.rcParams["svg.hashsalt"] = name  # equal plots are equal files
    figure = Figure(figsize=SIZE, layout="constrained")
    draw(figure)
    path = RESULTS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
