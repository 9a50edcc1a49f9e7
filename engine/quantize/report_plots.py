"""The report's plots as inline SVG: drawn by matplotlib, coloured by the page's own style sheet.

Text and axes take the page's colour and font, so that a plot fits a light and a dark page. Nothing
refers to anything outside of the SVG.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.quantize.layer import ROLES

# What matplotlib writes for it becomes the page's text colour.
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
}
# Told apart by people with any colour vision, on white and on near-black (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D")
_WIDTH = 7.6  # inches


def heat_map(errors: Sequence[Mapping[str, float]], label: str) -> str:
    """Layers from left to right, roles from top to bottom; of many experts the worst one."""
    columns = [_merge_experts(each) for each in errors]
    roles = list(dict.fromkeys(role for column in columns for role in column))
    roles.sort(key=_place_in_layer)
    values = [[column.get(role, float("nan")) for column in columns] for role in roles]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(values, cmap="viridis", vmin=0, edgecolor="face", linewidth=0.3)
        axes.set_yticks([i + 0.5 for i in range(len(roles))], roles)
        axes.set_xticks(*_layer_ticks(len(columns), 0.5))
        axes.invert_yaxis()
        axes.set_xlabel("layer")
        axes.grid(visible=False)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label("relative error of outputs")
        bar.outline.set_visible(False)

    return _svg(draw, 1.2 + 0.28 * len(roles), label)


def curves(lines: Mapping[str, Sequence[float]], label: str) -> str:
    """A line per name over the layers."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, (name, values) in enumerate(lines.items()):
            axes.plot(
                range(len(values)),
                values,
                label=name,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                linewidth=1.6,
            )
        longest = max(len(values) for values in lines.values())
        axes.set_xticks(*_layer_ticks(longest, 0.0))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error of hidden states")
        if len(lines) > 1:
            axes.legend(frameon=False)

    return _svg(draw, 3.0, label)


def _place_in_layer(role: str) -> int:
    name = role.rpartition(".")[2]
    return ROLES.index(name) if name in ROLES else len(ROLES)


def _merge_experts(errors: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for role, error in errors.items():
        name = re.sub(r"\.\d+", "", role)
        found[name] = max(error, found.get(name, 0.0))
    return found


def _layer_ticks(count: int, offset: float) -> tuple[list[float], list[str]]:
    """At most sixteen whole numbers."""
    step = -(-count // 16)
    numbers = range(0, count, step)
    return [i + offset for i in numbers], [str(i) for i in numbers]


def _svg(draw: Callable[[Any], None], height: float, label: str) -> str:
    """An <svg> element that a page can hold; `label` is plain text for those who cannot see it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    file = io.StringIO()
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": label}
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), label)


def _inline(text: str, label: str) -> str:
    """Of an SVG file, what HTML needs: no addresses of standards, no names that nobody uses."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    used = set(re.findall(r"#([^\s\")]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    start, rest = text.split(">", 1)  # the width is the page's
    start = re.sub(r' (width|height)="[^"]*"', "", start)
    start = start.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    rest = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", rest)
    return f"{start}>{rest}".replace(_INK, "currentColor")
