"""POST /tokenize and POST /detokenize, in vLLM's shapes."""

from fastapi import APIRouter
from starlette.requests import Request

from serve_app.api.body import read_body, served_model
from serve_app.protocol.messages import to_template
from serve_app.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from serve_app.served_model import ServedModel

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(request: Request) -> TokenizeResponse:
    """The token ids of a prompt or of a conversation in the model's chat template."""
    model = served_model(request)
    body = await read_body(request, TokenizeRequest)
    if body.model is not None:
        model.check_name(body.model)
    body.check()
    token_ids = await _encode(model, body)
    texts: list[str] | None = None
    if body.return_token_strs:
        texts = await model.run(
            lambda: [model.tokenizer.token_text(token_id) for token_id in token_ids],
            len(token_ids),
        )
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=model.info.session_len,
        tokens=token_ids,
        token_strs=texts,
    )


@router.post("/detokenize")
async def detokenize(request: Request) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    model = served_model(request)
    body = await read_body(request, DetokenizeRequest)
    if body.model is not None:
        model.check_name(body.model)
    model.check_token_ids(body.tokens, "tokens")
    (prompt,) = await model.decode([body.tokens], False)
    return DetokenizeResponse(prompt=prompt)


async def _encode(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        (token_ids,) = await model.encode([body.prompt], body.add_special_tokens is not False)
        return token_ids
    assert body.messages is not None
    continues = bool(body.continue_final_message)
    return await model.render_chat(
        to_template(body.messages, model.tokenizer.chat_template),
        add_generation_prompt=not continues
        if body.add_generation_prompt is None
        else body.add_generation_prompt,
        continue_final_message=continues,
        chat_template_kwargs=body.chat_template_kwargs,
    )
