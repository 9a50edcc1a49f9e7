"""README's table of engine settings is EngineConfig, and pyproject names what is imported."""

import ast
import re
import sys
import tomllib
from dataclasses import MISSING, fields
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from engine.config import EngineConfig, GiB

ROOT = Path(__file__).parents[1]
RESOLVED_LATER = {  # settings whose default is None, and what the README says it comes to
    "quantize": "no",
    "session_len": "the checkpoint's",
    "block_size": "16 on CPU, 64 on GPU",
    "num_threads": "cores / ranks there",
    "seed": "random",
}
NO_DISTRIBUTION = {"configs", "engine", "kernels", "serve_app"}  # this one


def readme_settings() -> dict[str, str]:
    section = (ROOT / "README.md").read_text().split("## Engine settings")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", section, re.MULTILINE)
    return dict(rows)


def written(name: str, default: object) -> str:
    """A default as the README writes it."""
    if default is MISSING:
        return "\N{EN DASH}"
    if default is None:
        return RESOLVED_LATER[name]
    if name.endswith("_bytes"):
        assert isinstance(default, int)
        return f"{default // GiB} GiB"
    return f"`{default}`" if isinstance(default, str) else str(default).lower()


def test_readme_has_every_setting_with_its_default() -> None:
    expected = {field.name: written(field.name, field.default) for field in fields(EngineConfig)}
    assert readme_settings() == expected


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/api.md",
        "docs/architecture.md",
        "docs/deploy.md",
        "docs/kernels.md",
        "docs/quantization.md",
    ],
)
def test_files_that_the_pages_name_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    paths = re.findall(
        r"`((?:engine|kernels|serve_app|tests|tools|benchmarks|configs|docs|models)/[\w./]+)`", text
    )
    assert linked or paths or page in ("docs/api.md", "docs/quantization.md")
    for target in linked:
        assert ((ROOT / page).parent / target).exists(), target
    for path in paths:
        assert (ROOT / path).exists(), path


def top_level_imports() -> set[str]:
    found: set[str] = set()
    for package in ("engine", "kernels", "serve_app"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - NO_DISTRIBUTION


def test_every_import_is_a_declared_dependency() -> None:
    """What only a dependency brings may go with its next release; extras do not count."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {canonical(re.split(r"[\[<>=;!~ ]", line)[0]) for line in project["dependencies"]}
    distributions = packages_distributions()
    for module in sorted(top_level_imports()):
        names = {canonical(name) for name in distributions.get(module, [module])}
        assert names & declared, f"{module} comes from {', '.join(names)}, undeclared"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
