"""POST /v1/chat/completions."""

import time
import uuid

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.body import read_body, served_model
from serve_app.api.chunks import ChunkFrame, quote
from serve_app.api.event_stream import EventStream, event_ids
from serve_app.event_ids import HEADER
from serve_app.generation import SESSION_HEADER, Delta, Generation, num_scores
from serve_app.protocol.chat import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
)
from serve_app.protocol.logprobs import ChatLogprobs, chat_logprobs, prompt_logprobs
from serve_app.protocol.usage import Usage
from serve_app.served_model import ServedModel

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(request: Request) -> Response:
    """An answer to a conversation, whole or (with stream) as server-sent events."""
    body = await read_body(request, ChatCompletionRequest)
    model = await served_model(request, body.model)
    generation = await _generation(model, body, request)
    if body.stream:
        return EventStream(generation, ChatChunks(model, generation, body))
    answers = await generation.run()
    completion = await model.run(
        lambda: _completion(model, body, generation, answers), num_scores(answers)
    )
    headers = {"Server-Timing": generation.times.server_timing()}
    return Response(completion, headers=headers, media_type="application/json")


async def _generation(
    model: ServedModel, body: ChatCompletionRequest, request: Request
) -> Generation:
    """The request as sequences; everything that is wrong with it is raised here."""
    body.check_stream_options()
    max_tokens = body.token_limit()
    num_logprobs = body.num_logprobs()
    params = await model.run(
        lambda: body.sampling_params(model, max_tokens=max_tokens, logprobs=num_logprobs),
        body.params_size,
    )
    model.check_num_sequences(1, params.n)
    if body.truncate_prompt_tokens is None:
        model.check_text(sum(message.num_characters for message in body.messages), "messages")
    prompt = await model.render_chat(
        body.messages,
        add_generation_prompt=body.opens_answer,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=body.chat_template_kwargs,
    )
    prompt = body.truncate(prompt)
    model.check_length(len(prompt), max_tokens, "messages")
    model.check_num_tokens([prompt], params.n)
    events = event_ids(model, body, request.headers.get(HEADER), params, params.n)
    await model.engine.ready()
    return Generation(
        model,
        [prompt],
        params,
        operation="chat",
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        received=request.state.received,
        cache_salt=body.cache_salt,
        user=body.user,
        session_id=request.headers.get(SESSION_HEADER),
        events=events,
    )


def _completion(
    model: ServedModel, body: ChatCompletionRequest, generation: Generation, answers: list[Delta]
) -> str:
    scores = answers[0].prompt_logprobs
    return ChatCompletion(
        id=generation.request_id,
        created=int(time.time()),
        model=model.name,
        choices=[_choice(model, body, answer) for answer in answers],
        usage=Usage.of(generation.counts()),
        prompt_logprobs=None if scores is None else prompt_logprobs(model.tokenizer, scores),
        prompt_token_ids=generation.prompts[0] if body.return_token_ids else None,
    ).model_dump_json()


def _choice(model: ServedModel, body: ChatCompletionRequest, answer: Delta) -> ChatChoice:
    assert answer.finish_reason is not None
    return ChatChoice(
        index=answer.index,
        message=AssistantMessage(content=answer.text),
        logprobs=_logprobs(model, answer),
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
        token_ids=answer.token_ids if body.return_token_ids else None,
    )


def _logprobs(model: ServedModel, delta: Delta) -> ChatLogprobs | None:
    return None if delta.logprobs is None else chat_logprobs(model.tokenizer, delta.logprobs)


class ChatChunks:
    """The events of a streamed chat: a role per choice, text, usage, [DONE]."""

    def __init__(
        self, model: ServedModel, generation: Generation, body: ChatCompletionRequest
    ) -> None:
        self._model = model
        frame = ChunkFrame(generation, body, "chat.completion.chunk", int(time.time()))
        self._frame = frame
        self._heads = [
            f'{frame.head}"choices":[{{"index":{index},"delta":'
            for index in range(generation.num_choices)
        ]

    def opening(self, index: int) -> bytes:
        role = '{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return f"{self._heads[index]}{role}{self._frame.tail()}".encode()

    def chunk(self, delta: Delta) -> bytes:
        if self._frame.is_silent(delta):
            return b""
        content = f'{{"content":{quote(delta.text)}}}' if delta.text else "{}"
        logprobs = _logprobs(self._model, delta)
        logged = "null" if logprobs is None else logprobs.model_dump_json()
        return (
            f'{self._heads[delta.index]}{content},"logprobs":{logged}'
            f"{self._frame.end_of_choice(delta)}}}{self._frame.tail()}"
        ).encode()

    def last(self) -> bytes:
        return self._frame.last()
