"""serve_app → engine → kernels, never back; ray only where it belongs; importing does nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "kernels": {"engine", "serve_app", "ray", "fastapi", "starlette", "transformers"},
    "engine": {"serve_app", "fastapi", "starlette", "ray"},
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_down_only(package: str) -> None:
    for path in modules(package):
        forbidden = FORBIDDEN[package]
        if path.name.startswith("ray_"):
            forbidden = forbidden - {"ray"}
        wrong = forbidden & set(imported(path))
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", ["scheduler", "block_manager", "batch", "engine", "batcher"])
def test_scheduling_needs_no_torch(name: str) -> None:
    """It must be testable, and its process startable, without the seconds torch takes."""
    code = f"import sys, engine.{name}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_engine_and_kernels_import_without_ray_and_fastapi() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("engine", "kernels")
        for path in modules(package)
        if not path.name.startswith("ray_")
    ]
    code = (
        "import sys, importlib\n"
        "for name in ('ray', 'fastapi', 'starlette'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "package", ["engine", "kernels", "serve_app", "tests", "benchmarks", "tools"]
)
def test_every_module_says_what_it_owns(package: str) -> None:
    for path in modules(package):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
