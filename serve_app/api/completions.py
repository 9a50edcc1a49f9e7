"""POST /v1/completions."""

import time
import uuid

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.sampling_params import SamplingParams
from serve_app.api.body import read_body, served_model
from serve_app.api.chunks import ChunkFrame, quote
from serve_app.api.event_stream import EventStream, event_ids
from serve_app.errors import invalid
from serve_app.event_ids import HEADER
from serve_app.generation import SESSION_HEADER, Delta, Generation, num_scores
from serve_app.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionRequest,
)
from serve_app.protocol.logprobs import (
    CompletionLogprobs,
    CompletionLogprobsBuilder,
    prompt_logprobs,
)
from serve_app.protocol.usage import Usage
from serve_app.served_model import ServedModel

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=Completion)
async def create_completion(request: Request) -> Response:
    """Continuations of one or more prompts, whole or (with stream) as server-sent events."""
    body = await read_body(request, CompletionRequest)
    model = await served_model(request, body.model)
    generation, echoes = await _generation(model, body, request)
    texts = _Texts(model, body, generation, echoes)
    if body.stream:
        return EventStream(generation, CompletionChunks(generation, body, texts))
    answers = await generation.run()
    completion = await model.run(
        lambda: _completion(model, body, generation, texts, answers), num_scores(answers)
    )
    headers = {"Server-Timing": generation.times.server_timing()}
    return Response(completion, headers=headers, media_type="application/json")


def _completion(
    model: ServedModel,
    body: CompletionRequest,
    generation: Generation,
    texts: "_Texts",
    answers: list[Delta],
) -> str:
    return Completion(
        id=generation.request_id,
        created=int(time.time()),
        model=model.name,
        choices=[_choice(model, body, generation, texts, answer) for answer in answers],
        usage=Usage.of(generation.counts()),
    ).model_dump_json()


async def _generation(
    model: ServedModel, body: CompletionRequest, request: Request
) -> tuple[Generation, list[str]]:
    """The request as sequences, and what echo puts before each prompt's choices."""
    body.check_stream_options()
    params = await model.run(lambda: _sampling_params(model, body), body.params_size)
    prompts = body.prompt_list()
    if not prompts:
        raise invalid("prompt is empty; it needs at least one token", "prompt")
    model.check_num_sequences(len(prompts), params.n)
    token_ids = [body.truncate(ids) for ids in await _encode(model, body, prompts)]
    for ids in token_ids:
        model.check_length(len(ids), body.max_tokens, "prompt")
    model.check_num_tokens(token_ids, params.n)
    echoes = ["" for _ in prompts]
    if body.echo:
        echoes = await model.decode(token_ids, params.skip_special_tokens, "prompt")
    events = event_ids(model, body, request.headers.get(HEADER), params, len(prompts) * params.n)
    await model.engine.ready()
    generation = Generation(
        model,
        token_ids,
        params,
        operation="text_completion",
        request_id=f"cmpl-{uuid.uuid4().hex}",
        received=request.state.received,
        cache_salt=body.cache_salt,
        user=body.user,
        session_id=request.headers.get(SESSION_HEADER),
        events=events,
    )
    return generation, echoes


def _sampling_params(model: ServedModel, body: CompletionRequest) -> SamplingParams:
    if body.echo and body.logprobs is not None:  # the prompt's tokens are reported like others
        scores = max(body.logprobs, body.prompt_logprobs or 0)
        body = body.model_copy(update={"prompt_logprobs": scores})
    return body.sampling_params(
        model,
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        default_max_tokens=DEFAULT_MAX_TOKENS,
    )


async def _encode(
    model: ServedModel, body: CompletionRequest, prompts: list[str] | list[list[int]]
) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if body.truncate_prompt_tokens is None:
        for text in texts:
            model.check_text(len(text), "prompt")
    encoded = await model.encode(texts, body.add_special_tokens is not False)
    given = [prompt for prompt in prompts if not isinstance(prompt, str)]
    for token_ids in given:
        model.check_token_ids(token_ids, "prompt")
    return encoded + given


def _choice(
    model: ServedModel,
    body: CompletionRequest,
    generation: Generation,
    texts: "_Texts",
    answer: Delta,
) -> CompletionChoice:
    assert answer.finish_reason is not None
    prompt = generation.prompts[answer.index // generation.n]
    text, logprobs = texts.of(answer)
    scores = answer.prompt_logprobs if body.prompt_logprobs is not None else None
    return CompletionChoice(
        index=answer.index,
        text=text,
        logprobs=logprobs,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
        prompt_logprobs=None if scores is None else prompt_logprobs(model.tokenizer, scores),
        token_ids=answer.token_ids if body.return_token_ids else None,
        prompt_token_ids=prompt if body.return_token_ids else None,
    )


class _Texts:
    """Text and logprobs of each choice, the echoed prompt in front of its first delta."""

    def __init__(
        self,
        model: ServedModel,
        body: CompletionRequest,
        generation: Generation,
        echoes: list[str],
    ) -> None:
        hidden = body.skip_special_tokens is not False
        self._logprobs = [
            CompletionLogprobsBuilder(model.tokenizer, hidden)
            for _ in range(generation.num_choices if body.logprobs is not None else 0)
        ]
        self._generation = generation
        self._echoes = echoes
        self._echoed = set() if body.echo else set(range(generation.num_choices))

    def of(self, delta: Delta) -> tuple[str, CompletionLogprobs | None]:
        text, token_ids, entries = delta.text, delta.token_ids, [*(delta.logprobs or ())]
        if delta.index not in self._echoed:
            self._echoed.add(delta.index)
            prompt = delta.index // self._generation.n
            text = self._echoes[prompt] + text
            token_ids = self._generation.prompts[prompt] + token_ids
            entries = [*(delta.prompt_logprobs or ()), *entries]
        if not self._logprobs:
            return text, None
        return text, self._logprobs[delta.index].build(token_ids, entries)


class CompletionChunks:
    """The events of streamed completions: text per choice, usage, [DONE]."""

    def __init__(self, generation: Generation, body: CompletionRequest, texts: _Texts) -> None:
        self._texts = texts
        self._echo = bool(body.echo)
        frame = ChunkFrame(generation, body, "text_completion", int(time.time()))
        self._frame = frame
        self._heads = [
            f'{frame.head}"choices":[{{"index":{index},"text":'
            for index in range(generation.num_choices)
        ]

    def opening(self, index: int) -> bytes:
        return b""

    def chunk(self, delta: Delta) -> bytes:
        if self._frame.is_silent(delta) and not self._echo:
            return b""
        text, logprobs = self._texts.of(delta)
        logged = "null" if logprobs is None else logprobs.model_dump_json()
        return (
            f'{self._heads[delta.index]}{quote(text)},"logprobs":{logged}'
            f"{self._frame.end_of_choice(delta)}}}{self._frame.tail()}"
        ).encode()

    def last(self) -> bytes:
        return self._frame.last()
