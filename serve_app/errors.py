"""ApiError: the one error every route raises, in OpenAI's JSON shape.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Engine errors become ApiErrors here and nowhere else.
"""

import json
import logging

from starlette.responses import Response

from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    EngineKilledError,
    InvalidRequestError,
    MantaError,
    QueueFullError,
)
from serve_app.async_engine import ShuttingDownError
from serve_app.event_ids import ResumeError

logger = logging.getLogger("ray.serve")

RESTART_S = 5  # Retry-After while Serve restarts a replica; one took 2.3 to 4.9 s
SHOWN = 60  # characters of an offending value


class ApiError(Exception):
    """`param` is the field at fault, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def to_json(self) -> str:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False)

    def to_response(self) -> Response:
        return Response(
            self.to_json(), self.status, headers=self.headers, media_type="application/json"
        )


def invalid(message: str, param: str | None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, detail: str = "") -> ApiError:
    return invalid(f"{param} is not supported by this server{detail}", param, "unsupported")


def shown(value: object) -> str:
    """A client's value as a message repeats it: short, whatever its size."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    text = repr(value[: SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def from_engine(error: MantaError) -> ApiError:
    """What a client is told about an error of the engine."""
    if isinstance(error, InvalidRequestError):
        return invalid(str(error), error.param)
    if isinstance(error, ResumeError):
        return ApiError(409, str(error), param="Last-Event-ID", code="cannot_resume")
    if isinstance(error, QueueFullError):
        return ApiError(
            429,
            str(error),
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(error.retry_after)},
        )
    if isinstance(error, ShuttingDownError):
        return _unavailable("this server is shutting down", "shutting_down")
    if isinstance(error, EngineKilledError):
        return ApiError(500, str(error), kind="server_error", code="engine_killed")
    if isinstance(error, EngineDeadError):  # why is for the replica's log: it names hosts and paths
        return _unavailable("the engine stopped and is being restarted", "engine_dead")
    if isinstance(error, ConfigError | CheckpointError):  # names paths too
        logger.error("a model cannot be served: %s", error)
        return ApiError(500, "this model cannot be served; its log says why", kind="server_error")
    return ApiError(500, str(error), kind="server_error")


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(
        503,
        f"{message}; try again in {RESTART_S} s",
        kind="service_unavailable_error",
        code=code,
        headers={"Retry-After": str(RESTART_S)},
    )
