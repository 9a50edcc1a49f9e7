"""Records of benchmark runs: tables of numbers with the machine, revision and command behind them.

One JSON file per benchmark in benchmarks/results; benchmarks/report.py renders them all.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "ray", "transformers")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells as they are shown; numbers stay numbers."""

    title: str
    columns: list[str]
    rows: list[list[str | float]]
    notes: list[str] = field(default_factory=list)


def save(
    name: str,
    title: str,
    tables: list[Table],
    folder: Path = RESULTS,
    device: dict[str, str] | None = None,
) -> Path:
    """Write NAME.json, over an earlier one; `device`: what computed, where it is not the CPU."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    record = {
        "name": name,
        "title": title,
        "command": _command(),
        "revision": _revision(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": (device or {}) | machine(),
        "tables": [asdict(table) for table in tables],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def show(table: Table) -> None:
    """The table as aligned text."""
    lines = [table.columns, *[[text(cell) for cell in row] for row in table.rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    print(f"\n{table.title}")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def text(cell: str | float) -> str:
    """A cell in about three digits."""
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    installed = {found.name for found in metadata.distributions()}
    versions = {name: metadata.version(name) for name in PACKAGES if name in installed}
    return {
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.1f}",  # of the minute before the record was written
        "python": platform.python_version(),
        **versions,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _command() -> str:
    """As it can be typed again: `python -m module` from the repository root."""
    spec = sys.modules["__main__"].__spec__
    name = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [sys.argv[0]]
    return " ".join(["python", *name, *sys.argv[1:]])


def _revision() -> str:
    """The commit, with a plus sign when files differ from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return "unknown"
    if commit.returncode != 0:
        return "unknown"
    changes = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", "../engine",
         "../kernels", "../serve_app"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    dirty = any("results/" not in line for line in changes.stdout.splitlines())
    return commit.stdout.strip() + ("+" if dirty else "")
