"""What is known of an engine's death: from a failed call to the line in the log."""

import asyncio
import logging

from engine.errors import EngineDeadError

logger = logging.getLogger("ray.serve")


def report_death(death: "asyncio.Future[EngineDeadError]", task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None and not death.done():
        death.set_result(as_death(error))


def as_death(error: BaseException) -> EngineDeadError:
    if isinstance(error, EngineDeadError):
        return error
    logger.warning("not an error of the engine", exc_info=error)
    return EngineDeadError(f"{type(error).__name__}: {error}")


def with_cause(error: BaseException) -> str:
    """An error and, where there is one, Ray's report of it."""
    return f"{error}: {error.__cause__}" if error.__cause__ else str(error)
