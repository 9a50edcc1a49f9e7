"""report.html: a report as one page that needs nothing else, neither files nor a network.

It owns the words and the look. Every number stands in a <data> element with its exact value, as
report.json has it. All text that comes from outside is escaped.
"""

from collections.abc import Iterable
from html import escape

from engine.quantize.comparison import Evaluation
from engine.quantize.report import Report, Result
from engine.quantize.report_plots import curves, heat_map
from engine.quantize.verdict import Level, explanation, headline, level_of

NUM_WORST = 10

_NOTHING = "\N{EN DASH}"
_SIGNS: dict[Level, tuple[str, str]] = {  # a class of the style sheet, and a sign beside its colour
    "no reference": ("plain", "?"),
    "unknown text": ("plain", "?"),
    "indistinguishable": ("good", "✓"),
    "very close": ("good", "✓"),
    "close": ("good", "✓"),
    "noticeable": ("fair", "!"),
    "heavy": ("poor", "✗"),
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --page: #fff; --card: #f4f6f8;
  --line: #d9dee3; --good: #18794e; --fair: #ad5700; --poor: #c62a2f; --plain: #5b6570; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a2abb5; --page: #14171a;
  --card: #1e2226; --line: #343a41; --good: #4cc38a; --fair: #f0a35e; --poor: #ff8b8b;
  --plain: #a2abb5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 58rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.path { overflow-wrap: anywhere; }
.verdict { border-left: .3rem solid var(--plain); background: var(--card); border-radius: .4rem;
  padding: .8rem 1.1rem; margin: 1rem 0; }
.verdict p { max-width: none; }
.verdict b { display: inline-block; margin-right: .6rem; }
.verdict.good { border-color: var(--good); } .good b { color: var(--good); }
.verdict.fair { border-color: var(--fair); } .fair b { color: var(--fair); }
.verdict.poor { border-color: var(--poor); } .poor b { color: var(--poor); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; font-size: .88rem; }
tbody th { font-weight: 500; white-space: nowrap; }
.facts th { width: 15rem; white-space: normal; }
.number { text-align: right; }
figure { margin: .6rem 0; }
svg { width: 100%; height: auto; color: var(--ink); }
@media print { body { padding: 0; } }
"""


def render_page(report: Report) -> str:
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "<main>\n" + "\n".join(_sections(report)) + "\n</main>\n</body>\n</html>\n"


def _sections(report: Report) -> Iterable[str]:
    yield f"<h1>{escape(report.title)}</h1>"
    yield f'<p class="soft path">{escape(report.model)}</p>'
    if report.reference is not None:
        yield f'<p class="soft path">beside {escape(report.reference)}</p>'
    for result in report.results:
        yield _verdict(result, named=len(report.results) > 1)
    yield "<h2>Quality on held-out text</h2>"
    yield "<p>Counted are the tokens of texts, and in chats those of the answers.</p>"
    yield _quality(report)
    yield "<h2>Size</h2>"
    yield _sizes(report)
    if any(report.linear_errors):
        yield "<h2>Errors of the linears</h2>"
        yield (
            "<p>How far the outputs of a linear on the calibration text are from those of the "
            "original weights, relative to their size. Light is worse.</p>"
        )
        yield f"<figure>{heat_map(report.linear_errors, 'Errors by layer and linear')}</figure>"
        yield _worst(report)
    lines = {each.name: each.evaluation.hidden_errors for each in report.results}
    if lines := {name: errors for name, errors in lines.items() if errors}:
        yield "<h2>Errors of the hidden states</h2>"
        yield "<p>How errors add up on the way through the layers: mean over tokens.</p>"
        yield f"<figure>{curves(lines, 'Errors of hidden states by layer')}</figure>"
        yield _hidden_errors(lines)
    yield "<h2>Text</h2>"
    yield _text(report)
    yield "<h2>Settings and cost</h2>"
    yield _settings(report)


def _verdict(result: Result, named: bool) -> str:
    style, sign = _SIGNS[level_of(result.evaluation)]
    title = headline(result.evaluation)
    title = f"{result.name}: {title}" if named else title.capitalize()
    return (
        f'<div class="verdict {style}"><p><b><span aria-hidden="true">{sign}</span> '
        f"{escape(title)}</b></p><p>{escape(explanation(result.evaluation))}</p></div>"
    )


def _quality(report: Report) -> str:
    columns = [
        "",
        "Perplexity of the reference",
        "Perplexity",
        "KL, mean (nats)",
        "KL, 99th percentile",
        "Same top token",
        "Tokens",
    ]
    rows = [[escape(each.name), *_quality_cells(each.evaluation)] for each in report.results]
    return _table(columns, rows)


def _quality_cells(found: Evaluation) -> list[str]:
    return [
        _number(found.reference_perplexity, "{:.6g}"),
        _number(found.perplexity, "{:.6g}"),
        _number(found.kl_mean, "{:.3g}"),
        _number(found.kl_p99, "{:.3g}"),
        _number(found.top1_agreement, "{:.2%}"),
        _number(found.num_tokens, "{:,}"),
    ]


def _sizes(report: Report) -> str:
    what = "Weight files" if report.kind == "weights" else "Keys and values of a token"
    rows = []
    for each in report.results:
        share = None
        if each.bytes_before and each.bytes_after is not None:
            share = each.bytes_after / each.bytes_before
        cells = _bytes(each.bytes_before), _bytes(each.bytes_after), _number(share, "{:.1%}")
        rows.append([escape(each.name), *cells])
    return _table([what, "Before", "After", "Share"], rows)


def _worst(report: Report) -> str:
    rows = [
        [f"{layer}", escape(role), _number(error, "{:.2%}")]
        for layer, role, error in report.worst_linears(NUM_WORST)
    ]
    return _table(["Layer", "Worst linears", "Relative error"], rows)


def _hidden_errors(lines: dict[str, tuple[float, ...]]) -> str:
    """The plot's numbers, folded away."""
    rows = [
        [f"{layer}", *(_number(error, "{:.2%}") for error in errors)]
        for layer, errors in enumerate(zip(*lines.values(), strict=True))
    ]
    table = _table(["Layer", *map(escape, lines)], rows)
    return f"<details><summary>The numbers</summary>{table}</details>"


def _text(report: Report) -> str:
    text, calibrated = report.text, any(report.linear_errors)
    rows = [
        ["Source", f'<span class="path">{escape(text.source)}</span>'],
        ["SHA-256", f'<span class="path">{escape(text.sha256)}</span>'],
        ["Documents", _number(text.num_documents, "{:,}")],
        ["Tokens", _number(text.num_tokens, "{:,}")],
        # Without a calibration there are no errors of linears, and those samples went unused.
        *([["Samples to calibrate on", _number(text.num_samples, "{:,}")]] * calibrated),
        ["Samples held out", _number(text.num_held_out, "{:,}")],
        ["Tokens of a sample", _number(text.seqlen, "{:,}")],
        ["Seed", _number(text.seed, "{}")],
        *(["Note", escape(note)] for note in text.notes),
    ]
    return _facts(rows)


def _settings(report: Report) -> str:
    rows = [
        [escape(name), _NOTHING if value is None else escape(str(value))]
        for name, value in report.settings.items()
    ]
    cost = [
        ["Time", _number(report.seconds, "{:,.1f} s")],
        ["Peak memory", _bytes(report.peak_memory)],
    ]
    return _facts([*rows, *cost])


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """Columns but the first hold numbers; cells are HTML."""
    head = "".join(
        f'<th scope="col"{_side(i, rows)}>{name}</th>' if name else "<td></td>"
        for i, name in enumerate(columns)
    )
    body = "".join(
        "<tr>"
        + f'<th scope="row">{row[0]}</th>'
        + "".join(f"<td{_side(i, rows)}>{cell}</td>" for i, cell in enumerate(row[1:], start=1))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody>'
        "</table></div>"
    )


def _facts(rows: list[list[str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{value}</td></tr>\n' for name, value in rows
    )
    return f'<div class="scroll"><table class="facts"><tbody>\n{body}</tbody></table></div>'


def _side(column: int, rows: list[list[str]]) -> str:
    is_number = any(row[column].startswith(("<data", _NOTHING)) for row in rows)
    return ' class="number"' if is_number else ""


def _number(value: float | None, form: str) -> str:
    if value is None:
        return _NOTHING
    return f'<data value="{value!r}">{form.format(value)}</data>'


def _bytes(count: int | None) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count is not None and count >= size:
            return _number(count, "{}").replace(f">{count}<", f">{count / size:.2f} {unit}<")
    return _number(count, "{:,} bytes")
