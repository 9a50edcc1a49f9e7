"""GET /v1/models, /health and /version: what this server is and whether it works."""

from importlib.metadata import version

from fastapi import APIRouter
from starlette.requests import Request

from serve_app.api.body import served_models
from serve_app.protocol.models import Health, ModelCard, ModelList, Version

router = APIRouter()


@router.get("/v1/models", tags=["OpenAI"])
async def list_models(request: Request) -> ModelList:
    models = served_models(request)
    return ModelList(data=[models.card(name) for name in models.names])


@router.get("/v1/models/{model_id:path}", tags=["OpenAI"])
async def get_model(request: Request, model_id: str) -> ModelCard:
    return served_models(request).card(model_id)


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["system"])
async def health(request: Request) -> Health:
    """503 when the engine is gone for good; while a dead one is being replaced, 200."""
    await served_models(request).own.engine.check()
    return Health()


@router.get("/version", tags=["system"])
async def get_version() -> Version:
    return Version(version=version("manta-serve"))
