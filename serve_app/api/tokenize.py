"""POST /tokenize and POST /detokenize, in vLLM's shapes."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.body import read_body, served_model
from serve_app.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from serve_app.served_model import ServedModel

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(request: Request) -> Response:
    """The token ids of a prompt or of a conversation in the model's chat template."""
    body = await read_body(request, TokenizeRequest)
    model = await served_model(request, body.model)
    body.check()
    token_ids = await _encode(model, body)
    answer = await model.run(lambda: _answer(model, body, token_ids), len(token_ids))
    return Response(answer, media_type="application/json")


def _answer(model: ServedModel, body: TokenizeRequest, token_ids: list[int]) -> str:
    texts = map(model.tokenizer.token_text, token_ids) if body.return_token_strs else None
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=model.info.session_len,
        tokens=token_ids,
        token_strs=None if texts is None else list(texts),
    ).model_dump_json()


@router.post("/detokenize")
async def detokenize(request: Request) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    body = await read_body(request, DetokenizeRequest)
    model = await served_model(request, body.model)
    (prompt,) = await model.decode([body.tokens], False, "tokens")
    return DetokenizeResponse(prompt=prompt)


async def _encode(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        (token_ids,) = await model.encode([body.prompt], body.add_special_tokens is not False)
        return token_ids
    assert body.messages is not None
    continues = bool(body.continue_final_message)
    return await model.render_chat(
        body.messages,
        add_generation_prompt=not continues
        if body.add_generation_prompt is None
        else body.add_generation_prompt,
        continue_final_message=continues,
        chat_template_kwargs=body.chat_template_kwargs,
    )
