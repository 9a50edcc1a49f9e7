"""create_http_app: the FastAPI application of a replica: routes, error shapes, docs.

Bodies are parsed by api/body.py and not by FastAPI (limits, error messages, threads), so their
schemas are added to the OpenAPI document here. /docs loads nothing from other hosts.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import MantaError
from serve_app.api import chat, completions, system, tokenize
from serve_app.errors import ApiError, from_engine
from serve_app.models import Models
from serve_app.protocol.chat import ChatCompletionRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.tokenize import DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def create_http_app(models: Models, end: Callable[[], Awaitable[None]]) -> FastAPI:
    """Its shutdown waits for `end`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await end()

    # Newer FastAPIs trace by themselves, with the client's span in the place of Serve's as parent.
    telemetry = {"tracing": False}
    app: FastAPI = FastAPIOffline(
        title="Manta", redoc_url=None, lifespan=lifespan, telemetry=telemetry
    )
    app.state.models = models
    for routes in (chat, completions, tokenize, system):
        app.include_router(routes.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(MantaError, _on_engine_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
    schema = _openapi(app)
    app.openapi = lambda: schema  # type: ignore[method-assign]  # FastAPI's documented way
    return app


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.to_response()


async def _on_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MantaError)
    return from_engine(error).to_response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Routing's own refusals: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code == 404:
        message += "; the routes are listed at /docs"
    headers = dict(error.headers or {})
    if "Allow" in headers:
        message += f"; use {headers['Allow']}"
    return ApiError(error.status_code, message, headers=headers).to_response()


async def _on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again behind this, so Serve's log has its traceback."""
    return ApiError(
        500, "internal error; the replica's log has it", kind="server_error"
    ).to_response()


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the request bodies it does not know."""
    document: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    reference = "#/components/schemas/{model}"
    _, bodies = models_json_schema(
        [(body, "validation") for body in BODIES.values()], ref_template=reference
    )
    document.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
    for path, body in BODIES.items():
        schema = {"$ref": reference.format(model=body.__name__)}
        document["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return document
