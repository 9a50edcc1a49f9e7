"""Render every record in benchmarks/results to docs/benchmarks.md.

python -m benchmarks.report
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, text

PAGE = RESULTS.parent.parent / "docs" / "benchmarks.md"
INTRO = """# Benchmarks

Made by `make bench` and, on a GPU, `make gpu-bench`, then rendered by
`python -m benchmarks.report`; the numbers are in [benchmarks/results](../benchmarks/results).
Every section says which machine, revision and command it comes from. Goals are in
bold where one was set before measuring.
"""


def main() -> None:
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([INTRO, *map(_section, records)]))
    print(f"{len(records)} records → {PAGE.relative_to(Path.cwd())}")


def _section(record: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [
        f"## {record['title']}",
        "",
        f"`{record['command']}`, {record['date']}, revision {record['revision']}; {machine}.",
        "",
    ]
    for table in record["tables"]:
        lines += _table(table)
    return "\n".join(lines)


def _table(table: dict[str, Any]) -> list[str]:
    rows = [[text(cell) for cell in row] for row in table["rows"]]
    return [
        f"### {table['title']}",
        "",
        f"| {' | '.join(table['columns'])} |",
        f"|{'---|' * len(table['columns'])}",
        *[f"| {' | '.join(row)} |" for row in rows],
        "",
        *[f"{note}\n" for note in table["notes"]],
    ]


if __name__ == "__main__":
    main()
