"""What a command says when it cannot go on: one line on stderr and an exit code, no traceback."""

import contextlib
import sys
from collections.abc import Iterator

import typer

from engine.errors import MantaError


@contextlib.contextmanager
def command_errors() -> Iterator[None]:
    """1 for our errors, 130 for Ctrl-C, whose error may say how to go on."""
    try:
        yield
    except MantaError as error:
        _say(str(error))
        sys.exit(1)
    except KeyboardInterrupt as error:
        if str(error):
            _say(str(error))
        sys.exit(130)


def _say(text: str) -> None:
    typer.echo(f"manta: {' '.join(text.split())}", err=True)
