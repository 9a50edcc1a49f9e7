"""Code and what surrounds it, for the calibration text: functions, queries, configs, logs.

Each writer draws one snippet; its words are chance, its syntax is right.
"""

import json
from collections.abc import Callable

from tools.demo_chat import Json
from tools.demo_words import ITEMS, WORDS, Source, split_words

FIELDS = split_words("""
    name price count total weight height created_at updated_at owner status email score rating
    width title city quantity user_id order_id balance rate limit offset path kind level
""")
VERBS = split_words("load parse merge filter sort update remove find build count validate render")
LEVELS = ("DEBUG", "INFO", "INFO", "INFO", "WARNING", "ERROR")
MODULES = split_words("auth cache db http queue scheduler storage worker mail billing")


def _pair(source: Source) -> tuple[str, str]:
    verb, noun = source.pick(VERBS), source.pick(ITEMS)
    return verb, noun


def _python(source: Source) -> str:
    verb, noun = _pair(source)
    field, other = source.rng.sample(FIELDS, 2)
    limit = source.rng.randint(2, 500)
    return source.pick(
        (
            f"def {verb}_{noun}s({noun}s: list[dict], {field}: int = {limit}) -> list[dict]:\n"
            f'    """Return the {noun}s whose {other} is above {field}."""\n'
            f"    found = []\n    for {noun} in {noun}s:\n"
            f'        if {noun}["{other}"] > {field}:\n            found.append({noun})\n'
            f'    return sorted(found, key=lambda each: each["{other}"])\n',
            f"from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\n"
            f"class {noun.capitalize()}:\n    {field}: str\n    {other}: float = {limit / 10}\n\n"
            f"    def {verb}(self) -> float:\n        if self.{other} < 0:\n"
            f'            raise ValueError(f"{other} must not be negative: {{self.{other}}}")\n'
            f"        return self.{other} * {source.rng.randint(2, 9)}\n",
            f"import sys\n\n{noun}s = [line.split() for line in sys.stdin if line.strip()]\n"
            f"total = sum(float({noun}[1]) for {noun} in {noun}s)\n"
            f'print(f"{{len({noun}s)}} {noun}s, {field} {{total:.2f}}")\n',
        )
    )


def _javascript(source: Source) -> str:
    verb, noun = _pair(source)
    field, other = source.rng.sample(FIELDS, 2)
    name = f"{verb}{noun.capitalize()}"
    return source.pick(
        (
            f"export async function {name}(id) {{\n"
            f"  const response = await fetch(`/api/{noun}s/${{id}}`);\n"
            f"  if (!response.ok) {{\n"
            f"    throw new Error(`{noun} ${{id}}: ${{response.status}}`);\n"
            f"  }}\n  const {{ {field}, {other} }} = await response.json();\n"
            f"  return {{ {field}, {other}: {other} ?? {source.rng.randint(0, 99)} }};\n}}\n",
            f"const {name} = ({noun}s) =>\n"
            f"  {noun}s\n    .filter((each) => each.{field} !== null)\n"
            f"    .map((each) => each.{other} * {source.rng.randint(2, 12)})\n"
            f"    .reduce((sum, value) => sum + value, 0);\n",
        )
    )


def _c(source: Source) -> str:
    verb, noun = _pair(source)
    field, size = source.pick(FIELDS), source.pick((16, 32, 64, 128, 256, 1024))
    return (
        f"#include <stdio.h>\n#include <stdlib.h>\n\n#define MAX_{noun.upper()}S {size}\n\n"
        f"struct {noun} {{\n    int {field};\n    double value;\n}};\n\n"
        f"static int {verb}_{noun}(const struct {noun} *items, size_t count)\n{{\n"
        f"    int best = -1;\n    for (size_t i = 0; i < count; i++) {{\n"
        f"        if (best < 0 || items[i].value > items[best].value)\n            best = (int)i;\n"
        f"    }}\n    return best;\n}}\n"
    )


def _rust(source: Source) -> str:
    verb, noun = _pair(source)
    field = source.pick(FIELDS)
    return (
        f"#[derive(Debug, Clone)]\npub struct {noun.capitalize()} {{\n    pub {field}: u64,\n}}\n\n"
        f"pub fn {verb}({noun}s: &[{noun.capitalize()}]) -> Option<u64> {{\n"
        f"    {noun}s.iter().map(|each| each.{field}).filter(|v| *v > "
        f"{source.rng.randint(1, 99)}).max()\n}}\n"
    )


def _go(source: Source) -> str:
    verb, noun = _pair(source)
    name = f"{verb.capitalize()}{noun.capitalize()}"
    return (
        f"// {name} returns an error when the {noun} does not exist.\n"
        f"func {name}(ctx context.Context, id string) (*{noun.capitalize()}, error) {{\n"
        f'\tif id == "" {{\n\t\treturn nil, errors.New("{noun}: empty id")\n\t}}\n'
        f"\titem, ok := store[id]\n\tif !ok {{\n"
        f'\t\treturn nil, fmt.Errorf("{noun} %q not found", id)\n\t}}\n\treturn item, nil\n}}\n'
    )


def _sql(source: Source) -> str:
    noun, other = source.rng.sample(ITEMS, 2)
    field, by = source.rng.sample(FIELDS, 2)
    return source.pick(
        (
            f"SELECT {by}, COUNT(*) AS num_{noun}s, AVG({field}) AS mean_{field}\nFROM {noun}s\n"
            f"WHERE {field} >= {source.rng.randint(1, 999)} AND {by} IS NOT NULL\nGROUP BY {by}\n"
            f"ORDER BY mean_{field} DESC\nLIMIT {source.rng.randint(5, 50)};\n",
            f"CREATE TABLE {noun}s (\n    id INTEGER PRIMARY KEY,\n    {field} TEXT NOT NULL,\n"
            f"    {by} NUMERIC(10, 2) DEFAULT 0,\n"
            f"    {other}_id INTEGER REFERENCES {other}s (id)\n);\n",
            f"UPDATE {noun}s SET {field} = {field} + {source.rng.randint(1, 20)} WHERE id IN (\n"
            f"    SELECT {noun}_id FROM {other}s WHERE {by} < '{_date(source)}'\n);\n",
        )
    )


def _shell(source: Source) -> str:
    word, other = source.rng.sample(WORDS, 2)
    return source.pick(
        (
            f'#!/bin/sh\nset -eu\nfor file in {word}/*.txt; do\n    lines=$(wc -l < "$file")\n'
            f'    if [ "$lines" -gt {source.rng.randint(10, 900)} ]; then\n'
            f'        gzip -9 "$file" && mv "$file.gz" /var/backups/{other}/\n    fi\ndone\n',
            f"git checkout -b {word}-{other}\ngit add src/{word}.py tests/test_{word}.py\n"
            f'git commit -m "Move {word} out of {other}"\ngit push origin {word}-{other}\n',
            f"docker run --rm -p {source.rng.randint(3000, 9999)}:80 "
            f"-v $PWD/{word}:/data {other}:1.{source.rng.randint(0, 30)}\n",
            f"curl -s 'http://localhost:{source.rng.randint(3000, 9999)}/v1/{word}s?limit="
            f"{source.rng.randint(1, 99)}' | jq '.items[] | select(.{other} != null) | .id'\n",
        )
    )


def _html(source: Source) -> str:
    word, other, noun = *source.rng.sample(WORDS, 2), source.pick(ITEMS)
    return (
        f'<section id="{word}" class="card {other}">\n  <h2>{noun.capitalize()}s</h2>\n  <ul>\n'
        + "".join(f"    <li><a href=\"/{noun}/{i}\">{source.pick(WORDS)}</a></li>\n"
                  for i in range(1, source.rng.randint(3, 6)))
        + f'  </ul>\n  <button type="submit" disabled>Add a {noun}</button>\n</section>\n'
    )  # fmt: skip


def _json(source: Source) -> str:
    value: Json = {
        "id": source.rng.randint(1, 99_999),
        source.pick(FIELDS): source.pick(WORDS),
        "tags": [*source.rng.sample(WORDS, 3)],
        "size": {"width": source.rng.randint(1, 400), "height": source.rng.randint(1, 400) / 10},
        "active": source.chance(0.5),
        "parent": None,
    }
    return json.dumps(value, indent=source.pick((None, 2, 4))) + "\n"


def _yaml(source: Source) -> str:
    word, module = source.pick(WORDS), source.pick(MODULES)
    return (
        f"# settings of {module}\nservice: {word}-{module}\nreplicas: {source.rng.randint(1, 12)}\n"
        f"resources:\n  cpu: {source.rng.randint(1, 16)}\n  memory: {2 ** source.rng.randint(0, 6)}"
        f"Gi\nenv:\n  - name: LOG_LEVEL\n    value: {source.pick(LEVELS).lower()}\n"
        f"  - name: {module.upper()}_TIMEOUT\n    value: \"{source.rng.randint(1, 120)}s\"\n"
    )  # fmt: skip


def _log(source: Source) -> str:
    second, lines = source.rng.randint(0, 40_000), []
    for _ in range(source.rng.randint(4, 9)):
        second += source.rng.randint(0, 90)
        clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
        verb, noun = _pair(source)
        lines.append(
            f"{_date(source)} {clock},{source.rng.randint(0, 999):03} {source.pick(LEVELS):<7} "
            f"{source.pick(MODULES)}: {verb} {noun} {source.rng.randint(1, 9999)} took "
            f"{source.rng.randint(1, 9000) / 10} ms"
        )
    return "\n".join(lines) + "\n"


def _traceback(source: Source) -> str:
    verb, noun = _pair(source)
    field, module = source.pick(FIELDS), source.pick(MODULES)
    error = source.pick(
        (
            f"KeyError: '{field}'",
            f"TypeError: {verb}() takes 1 argument but 2 were given",
            f"ValueError: invalid {field}: '{source.pick(WORDS)}'",
        )
    )
    return (
        f"Traceback (most recent call last):\n"
        f'  File "{module}/{noun}.py", line {source.rng.randint(1, 400)}, in {verb}_{noun}\n'
        f"    return {noun}.{verb}({field})\n{error}\n"
    )


def _date(source: Source) -> str:
    year, month, day = (source.rng.randint(*r) for r in ((2010, 2029), (1, 12), (1, 28)))
    return f"{year}-{month:02}-{day:02}"


CODE: dict[str, Callable[[Source], str]] = {
    "python": _python,
    "javascript": _javascript,
    "c": _c,
    "rust": _rust,
    "go": _go,
    "sql": _sql,
    "sh": _shell,
    "html": _html,
    "json": _json,
    "yaml": _yaml,
    "log": _log,
    "traceback": _traceback,
}
REQUESTS = (
    "Show me an example of {}.",
    "Write a short piece of {}.",
    "I am learning {}. Can you give me a small example?",
    "What does typical {} look like?",
)


def code_text(source: Source) -> str:
    """Several snippets of one language, as in a file or a terminal."""
    write = source.pick(list(CODE.values()))
    return "\n".join(write(source) for _ in range(source.rng.randint(1, 3)))


def code_answer(source: Source) -> tuple[str, str]:
    """A request for code, and an answer with a fenced block."""
    language = source.pick([name for name in CODE if name not in ("log", "traceback")])
    name = {"sh": "shell script", "c": "C"}.get(language, language)
    closing = source.pick(
        ("", "\n\nChange the names to fit your project.", "\n\nIt has no further dependencies.")
    )
    return (
        source.pick(REQUESTS).format(name),
        f"Here is an example:\n\n```{language}\n{CODE[language](source)}```{closing}",
    )
