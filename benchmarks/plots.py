"""Plots beside the records: SVG files in benchmarks/results, drawn by matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

SIZE = (9.0, 5.0)  # inches


def save_plot(name: str, draw: Callable[[Any], None]) -> Path:
    """Write results/NAME.svg. `draw` gets an empty figure."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = name  # equal plots are equal files
    figure = Figure(figsize=SIZE, layout="constrained")
    draw(figure)
    path = RESULTS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
