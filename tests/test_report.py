"""The report: one set of numbers as JSON and as a page that needs nothing outside of itself."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.quantize import verdict
from engine.quantize.calibration import TextRecord
from engine.quantize.comparison import Evaluation
from engine.quantize.report import HTML_FILE, JSON_FILE, Report, Result, write_report
from engine.quantize.report_page import NUM_WORST, render_page
from engine.quantize.verdict import level_of, words

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
VOID = {"meta", "link", "br", "img", "hr", "input"}


def evaluation(kl: float = 0.004, perplexity: float = 12.345678) -> Evaluation:
    return Evaluation(
        num_tokens=8176,
        perplexity=perplexity,
        reference_perplexity=12.3,
        kl_mean=kl,
        kl_p99=10 * kl,
        top1_agreement=0.9876543,
        hidden_errors=(0.0123, 0.0456, 0.0789),
    )


def report(**changes: Any) -> Report:
    text = TextRecord(
        source="chats.jsonl",
        sha256="ab" * 32,
        num_documents=123,
        num_tokens=45_678,
        seqlen=512,
        seed=7,
        num_samples=64,
        num_held_out=16,
        notes=("The text has 64 samples to calibrate on, 128 were asked for.",),
    )
    made = Report(
        kind="weights",
        title="AWQ, 4 bits",
        model="models/demo-awq",
        reference="models/demo",
        results=(
            Result(
                name="demo-awq", evaluation=evaluation(), bytes_before=11_553_000, bytes_after=4_661
            ),
        ),
        linear_errors=tuple(
            {role: 0.01 * layer + 0.001 * i for i, role in enumerate(ROLES)} for layer in range(3)
        ),
        settings={"bits": 4, "search_scale": True, "clip": None, "method": "awq"},
        text=text,
        seconds=12.3456,
        peak_memory=385_540_096,
    )
    return replace(made, **changes)


class Page(HTMLParser):
    """Elements in their order, whose tags must be closed one within the other."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.numbers: list[tuple[float, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "data":
            self.numbers.append((float(dict(attrs)["value"] or ""), ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._open and self._open[-1] == "data":
            self.numbers[-1] = (self.numbers[-1][0], data)

    def text(self) -> str:
        return " ".join(self.words)


def numbers_of(value: Any) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return []
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers_of(part)]
    return [value]


def test_json_reads_back_as_the_same_report() -> None:
    made = report()
    assert Report.from_json(made.to_json()) == made
    alone = Result(name="alone", evaluation=Evaluation(num_tokens=5, perplexity=3.25))
    made = report(results=(alone,), linear_errors=(), reference=None)
    assert Report.from_json(made.to_json()) == made


def test_json_has_its_version_and_verdicts() -> None:
    values = json.loads(report().to_json())
    assert values["version"] == 1
    assert values["results"][0]["verdict"]["level"] == "very close"
    assert "0.004 nats" in values["results"][0]["verdict"]["words"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 99}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="report"):
        Report.from_json(text)


def test_numbers_on_the_page_are_those_in_the_json() -> None:
    made = report()
    page = Page(render_page(made))
    values = json.loads(made.to_json())
    (result,) = values["results"]
    expected = numbers_of(result) + numbers_of(values["text"]) + [12.3456, 385_540_096]
    shown = [value for value, _ in page.numbers]
    assert set(expected) <= set(shown)
    worst = sorted(numbers_of(values["linear_errors"]), reverse=True)[:NUM_WORST]
    share = result["bytes_after"] / result["bytes_before"]
    assert sorted(shown) == sorted([*expected, *worst, share])
    forms = dict(page.numbers)
    assert forms[0.9876543] == "98.77%"
    assert forms[12.345678] == "12.3457"
    assert forms[11_553_000] == "11.55 MB"
    assert forms[4661] == "4.66 kB"


def test_the_page_needs_nothing_from_outside() -> None:
    text = render_page(report())
    assert not re.search(r"https?:|//[a-z]|@import", text)
    page = Page(text)
    # Beside fragments of its own, such as a plot's clip paths.
    links = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert not [tag for tag, _, _ in page.attributes if tag in ("script", "link", "iframe", "img")]


def test_plots_are_drawn_and_named() -> None:
    page = Page(render_page(report()))
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == ["Errors by layer and linear", "Errors of hidden states by layer"]
    assert set(ROLES) <= {word.strip() for word in page.words}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [v for _, name, v in page.attributes if name == "xlink:href" and v.startswith("#")]
    assert {link.removeprefix("#") for link in used} <= set(ids)


def test_a_report_without_a_reference_has_no_plots_and_no_invented_numbers() -> None:
    alone = Result(name="alone", evaluation=Evaluation(num_tokens=5, perplexity=3.25))
    # A method without calibration has layers, and no errors of their linears.
    text = render_page(report(results=(alone,), linear_errors=({}, {}), reference=None))
    assert "<svg" not in text
    assert "No reference" in Page(text).text()
    assert "None" not in text
    assert "to calibrate on" not in re.sub("<td>.*?</td>", "", text)


def test_policies_of_a_cache_are_told_apart() -> None:
    results = tuple(
        Result(name=f"quant_policy {policy}", evaluation=evaluation(kl, 12.3), bytes_after=policy)
        for policy, kl in ((8, 1e-5), (4, 0.3))
    )
    text = Page(render_page(report(kind="kv_cache", results=results, linear_errors=()))).text()
    assert "quant_policy 8: indistinguishable" in text
    assert "quant_policy 4: heavy loss" in text
    assert "Keys and values of a token" in text


def test_roles_are_in_the_order_of_the_layer() -> None:
    shuffled = dict.fromkeys(sorted(ROLES), 0.1)
    page = Page(render_page(report(linear_errors=(shuffled,))))
    drawn = [word.strip() for word in page.words if word.strip() in ROLES]
    assert tuple(drawn[: len(ROLES)]) == ROLES


def test_many_experts_share_a_row_of_the_heat_map() -> None:
    errors = {f"experts.{i}.down": 0.1 + i for i in range(20)} | {"q": 0.1}
    page = Page(render_page(report(linear_errors=(errors, errors))))
    drawn = {word.strip() for word in page.words}
    assert "experts.down" in drawn
    assert "experts.19.down" in drawn  # in the table of the worst
    assert "experts.3.down" not in drawn


def test_what_comes_from_outside_is_escaped() -> None:
    evil = "<script>alert('&')</script>"
    results = tuple(replace(each, name=evil + str(i)) for i in (0, 1) for each in report().results)
    made = report(
        title=evil,
        model=evil,
        reference=evil,
        results=results,
        settings={evil: evil},
        linear_errors=({evil: 0.1},),
        text=replace(report().text, source=evil, notes=(evil,)),
    )
    text = render_page(made)
    assert "<script" not in text
    assert Page(text).text().count(evil) >= 8


def test_both_files_are_written_whole(tmp_path: Path) -> None:
    made = report()
    write_report(made, tmp_path)
    write_report(made, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([HTML_FILE, JSON_FILE])
    assert Report.from_json((tmp_path / JSON_FILE).read_text(encoding="utf-8")) == made
    assert (tmp_path / HTML_FILE).read_text(encoding="utf-8") == render_page(made)


@pytest.mark.parametrize(
    ("kl", "perplexity", "level"),
    [
        (0.0005, 12.3, "indistinguishable"),
        (verdict.INDISTINGUISHABLE, 12.3, "very close"),
        (verdict.VERY_CLOSE, 12.3, "close"),
        (verdict.CLOSE, 12.3, "noticeable"),
        (verdict.NOTICEABLE, 12.3, "heavy"),
        (0.0005, 12.3 * math.exp(0.03), "close"),  # the perplexity alone tells
        (0.0005, 12.3 * math.exp(0.3), "heavy"),
        (0.03, 12.0, "close"),  # a lower perplexity excuses nothing
    ],
)
def test_the_verdict_is_the_worse_of_divergence_and_loss(
    kl: float, perplexity: float, level: str
) -> None:
    assert level_of(evaluation(kl, perplexity)) == level


def test_the_verdict_says_what_it_cannot_tell() -> None:
    alone = Evaluation(num_tokens=5, perplexity=3.25)
    assert level_of(alone) == "no reference"
    assert "Perplexity 3.25" in words(alone)
    foreign = replace(evaluation(), reference_perplexity=9000.0, perplexity=9100.0)
    assert level_of(foreign) == "unknown text"
    assert "text of its own kind" in words(foreign)


def test_a_verdict_names_its_numbers() -> None:
    said = words(evaluation())
    assert "0.004 nats" in said
    assert "98.8%" in said
    assert "+0.37%, from 12.3 to 12.35" in said
