"""ApiError: the one error every route raises, in OpenAI's JSON shape.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Engine errors become ApiErrors here and nowhere else.
"""

import json

from starlette.responses import Response

from engine.errors import EngineDeadError, InvalidRequestError, MantaError, QueueFullError

RESTART_S = 5  # Retry-After while Serve restarts a replica; one took 2.3 to 4.9 s


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


def from_engine(error: MantaError) -> ApiError:
    """What a client is told about an error of the engine."""
    if isinstance(error, InvalidRequestError):
        return invalid(str(error), error.param)
    if isinstance(error, QueueFullError):
        return ApiError(
            429,
            str(error),
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(error.retry_after)},
        )
    if isinstance(error, EngineDeadError):
        return ApiError(
            503,
            f"the engine stopped and is being restarted: {error}",
            kind="service_unavailable_error",
            code="engine_dead",
            headers={"Retry-After": str(RESTART_S)},
        )
    return ApiError(500, str(error), kind="server_error")
