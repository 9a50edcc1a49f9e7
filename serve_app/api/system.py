"""GET /v1/models, /health and /version: what this server is and whether it works."""

from importlib.metadata import version

from fastapi import APIRouter
from starlette.requests import Request

from serve_app.api.body import served_model
from serve_app.protocol.models import Health, ModelCard, ModelList, Version
from serve_app.served_model import ServedModel

router = APIRouter()


@router.get("/v1/models", tags=["OpenAI"])
async def list_models(request: Request) -> ModelList:
    return ModelList(data=[_card(served_model(request))])


@router.get("/v1/models/{model_id:path}", tags=["OpenAI"])
async def get_model(request: Request, model_id: str) -> ModelCard:
    model = served_model(request)
    model.check_name(model_id)
    return _card(model)


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["system"])
async def health(request: Request) -> Health:
    """503 when the engine is gone for good; while a dead one is being replaced, 200."""
    await served_model(request).engine.check()
    return Health()


@router.get("/version", tags=["system"])
async def get_version() -> Version:
    return Version(version=version("manta-serve"))


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, max_model_len=model.info.session_len)
