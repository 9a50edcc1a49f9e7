"""Reading a request's body: bounded, parsed, and off the loop when it is large."""

import asyncio
import time
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from serve_app.errors import ApiError
from serve_app.models import Models
from serve_app.protocol.parse import parse
from serve_app.served_model import ServedModel

Model = TypeVar("Model", bound=BaseModel)
INLINE_BYTES = 64 * 1024  # parsing these takes about 0.5 ms


def served_models(request: Request) -> Models:
    models = request.app.state.models
    assert isinstance(models, Models)
    return models


async def served_model(request: Request, name: str | None) -> ServedModel:
    """The model of that name, the first one without; ApiError 404 for a name that none has."""
    models = served_models(request)
    return models.own if name is None else await models.get(name)


async def read_body(request: Request, model: type[Model]) -> Model:
    """ApiError 413 for a body beyond the limit, 400 for one that is not a `model`.

    Notes in `request.state.received` when all of it was there.
    """
    body = await _read(request, served_models(request).max_body_bytes)
    request.state.received = time.perf_counter()
    if len(body) <= INLINE_BYTES:
        return parse(model, body)
    return await asyncio.to_thread(parse, model, body)


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body may have {limit} bytes (max_body_bytes)", code="body_too_large")
