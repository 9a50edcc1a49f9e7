"""Report: what a quantisation or an evaluation found, as report.json and as a page to read.

It holds results and says how they lie in JSON; how they were measured is others' affair. The form
of report.json is that of the dataclasses here, key by key: `version` is SCHEMA_VERSION, and a
change that a reader of the file could stumble over raises it. Each result carries the verdict in
words beside its numbers. Absent values are null.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.errors import CheckpointError
from engine.quantize.calibration import TextRecord
from engine.quantize.comparison import Evaluation
from engine.quantize.verdict import level_of, words

SCHEMA_VERSION = 1
JSON_FILE = "report.json"
HTML_FILE = "report.html"

Setting = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One model, or one cache, beside the reference; `name` tells it from the report's others.

    The bytes are of all weight files, in a report on caches of one token's keys and values.
    """

    name: str
    evaluation: Evaluation
    bytes_before: int | None = None  # of the reference
    bytes_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    kind: Literal["weights", "kv_cache"]
    title: str
    model: str  # the checkpoint's directory
    reference: str | None
    results: tuple[Result, ...]
    # Of each layer by role: ‖y' − y‖ / ‖y‖ of a linear's outputs on the calibration text.
    linear_errors: tuple[Mapping[str, float], ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    text: TextRecord
    seconds: float
    peak_memory: int  # bytes, of the largest process

    def __post_init__(self) -> None:
        assert self.results

    def to_json(self) -> str:
        values = {"version": SCHEMA_VERSION, **asdict(self)}
        for value, result in zip(values["results"], self.results, strict=True):
            value["verdict"] = {
                "level": level_of(result.evaluation),
                "words": words(result.evaluation),
            }
        return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """CheckpointError when the text is no report of this version."""
        try:
            values = json.loads(text)
            version = values.pop("version")
            if version != SCHEMA_VERSION:
                raise CheckpointError(
                    f"this report is of version {version}, and {SCHEMA_VERSION} is read here"
                )
            results = tuple(_read_result(value) for value in values.pop("results"))
            text_record = values.pop("text")
            text_record["notes"] = tuple(text_record["notes"])
            errors = tuple(values.pop("linear_errors"))
            record = TextRecord(**text_record)
            return cls(**values, results=results, linear_errors=errors, text=record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"this is not a report: {error!r}") from error

    def worst_linears(self, count: int) -> list[tuple[int, str, float]]:
        """Layer, role and error, the largest first."""
        found = [
            (layer, role, error)
            for layer, errors in enumerate(self.linear_errors)
            for role, error in errors.items()
        ]
        return sorted(found, key=lambda each: -each[2])[:count]


def write_report(report: Report, directory: Path) -> None:
    """report.json and report.html, each whole or not there."""
    from engine.quantize.report_page import render_page  # it imports this module

    for name, text in ((JSON_FILE, report.to_json()), (HTML_FILE, render_page(report))):
        temporary = directory / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / name)


def _read_result(value: dict[str, Any]) -> Result:
    value.pop("verdict")
    evaluation = value.pop("evaluation")
    evaluation["hidden_errors"] = tuple(evaluation["hidden_errors"])
    return Result(**value, evaluation=Evaluation(**evaluation))
