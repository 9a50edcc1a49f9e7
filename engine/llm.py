"""LLM: offline generation in this process. Text or token ids in, finished outputs out."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from engine.chat_template import Message
from engine.completion import CompletionStream, sequence_requests
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, InvalidRequestError
from engine.local_executor import LocalExecutor
from engine.outputs import FinishReason, SequenceOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    `stop_reason` is the stop string, or the entry of stop_token_ids, that ended it; when
    `finish_reason` is "error", what went wrong. Other sequences go on.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its `n` completions."""

    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0


class LLM:
    """A model loaded for offline use. Keyword arguments are EngineConfig's.

    >>> llm = LLM("models/demo-awq")
    >>> llm.chat([{"role": "user", "content": "What is 12 + 30?"}])[0].outputs[0].text
    """

    def __init__(self, model: str, **config: Any) -> None:
        self.config = EngineConfig.from_dict({"model": model, **config}, "LLM")
        if self.config.num_ranks > 1:
            tp, pp = self.config.tp, self.config.pp
            raise ConfigError(
                f"LLM runs in one process (tp=1, pp=1), got tp={tp}, pp={pp}; "
                f"`manta serve --tp {tp} --pp {pp}` starts one process per rank"
            )
        self.tokenizer = Tokenizer.load(model)
        self._engine = Engine(self.config, LocalExecutor(self.config))
        self._ids = map(str, itertools.count())

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs come in the order of the prompts.

        `params` is one for all or one per prompt; None takes the checkpoint's own defaults.
        InvalidRequestError names a prompt or parameter that cannot be served; then nothing runs.
        """
        items: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        for index, item in enumerate(items):
            if not isinstance(item, str) and not isinstance(item, Sequence):
                raise InvalidRequestError(
                    f"prompts must be a string, a list of strings or a list of token id lists; "
                    f"prompts[{index}] is {item!r}",
                    "prompts",
                )
        requests = [
            _Request(self.tokenizer, prompt, each, self._ids)
            for prompt, each in zip(items, self._params(params, len(items)), strict=True)
        ]
        with tqdm(total=len(requests), unit="prompt", disable=not use_tqdm) as progress:
            for finished in self._run(requests):
                progress.update(finished)
        return [request.output for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: a list of messages, or a list of such lists."""
        if not messages:
            raise InvalidRequestError("messages is empty; a chat needs at least one", "messages")
        chats: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [
            self.tokenizer.render_chat(chat, chat_template_kwargs=chat_template_kwargs)
            for chat in chats
        ]
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Answer one conversation piece by piece; closing the iterator ends the generation."""
        prompt = self.tokenizer.render_chat(messages)
        each = self._params(params, 1)[0]
        request = _Request(self.tokenizer, prompt, replace(each, n=1), self._ids)
        completion = request.output.outputs[0]
        sent = 0
        for _ in self._run([request], every_step=True):
            if len(completion.text) > sent:
                yield completion.text[sent:]
                sent = len(completion.text)

    def close(self) -> None:
        """Release the model's memory; the object cannot be used again."""
        self._engine.close()
        del self._engine

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if params is None:
            defaults: Any = self.tokenizer.sampling_defaults
            params = SamplingParams(**defaults)
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise InvalidRequestError(
                f"params must be one SamplingParams or one per prompt: {len(params)} for {count} "
                "prompts",
                "params",
            )
        return params

    def _run(self, requests: "list[_Request]", every_step: bool = False) -> Iterator[int]:
        """Step until all is done; yields how many requests finished, when any did."""
        sequences = {
            each.request_id: (request, index)
            for request in requests
            for index, each in enumerate(request.engine_requests)
        }
        try:
            for request in requests:
                for engine_request in request.engine_requests:
                    self._engine.add(engine_request)
            while self._engine.has_work:
                num_finished = 0
                for output in self._engine.step():
                    request, index = sequences[output.request_id]
                    if request.absorb(index, output).finish_reason is not None:
                        self._engine.abort(output.request_id)  # a stop string may have ended it
                        num_finished += request.finished
                if num_finished or every_step:
                    yield num_finished
        finally:
            for request_id in sequences:
                self._engine.abort(request_id)


class _Request:
    """A prompt on its way: n sequences, their text, the output they fill."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams, ids: Iterator[str]
    ) -> None:
        text = prompt if isinstance(prompt, str) else None
        token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.output = RequestOutput(
            text, token_ids, [CompletionOutput(index) for index in range(params.n)]
        )
        self.engine_requests = sequence_requests(
            [next(ids) for _ in range(params.n)], token_ids, params, tokenizer.eos_token_ids
        )
        self._streams = [CompletionStream(tokenizer, request) for request in self.engine_requests]

    def absorb(self, index: int, output: SequenceOutput) -> CompletionOutput:
        """Add what the engine reported to completion `index`."""
        completion = self.output.outputs[index]
        delta = self._streams[index].push(output)
        completion.text += delta.text
        completion.token_ids += delta.token_ids
        if delta.logprobs is not None:
            completion.logprobs = completion.logprobs or []
            completion.logprobs += delta.logprobs
        completion.finish_reason = delta.finish_reason
        completion.stop_reason = str(output.error) if output.error else delta.stop_reason
        if output.prompt_logprobs is not None:
            self.output.prompt_logprobs = output.prompt_logprobs
        if index == 0:
            self.output.num_cached_tokens += output.num_cached_tokens  # in its first report only
        return completion

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason for completion in self.output.outputs)
