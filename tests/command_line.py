"""The `manta` command in this process, and what tests give it."""

from pathlib import Path

from typer.testing import CliRunner

from serve_app.cli import app

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo-awq"


def manta(*args: str) -> tuple[int, str]:
    """Its exit code and what it prints."""
    result = CliRunner().invoke(app, args, terminal_width=200)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a bug: what is for the user exits
    return result.exit_code, result.output
