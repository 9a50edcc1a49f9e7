"""ServedModel: everything a route needs of the one model behind it.

Text to token ids without blocking the loop, the limits requests are held to, and the engine. What
the engine checks (empty prompts, sampling parameters) is not checked here again.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from engine.config import EngineConfig
from serve_app.engines import Engines
from serve_app.errors import invalid
from serve_app.metrics import Metrics
from serve_app.model_spec import Context, Limits, ModelSpec
from serve_app.protocol.messages import Message, to_template
from serve_app.tracing import RequestTracer

if TYPE_CHECKING:
    from engine.executor import EngineInfo
    from engine.tokenizer import Tokenizer

INLINE_SIZE = 2000  # takes about 1 ms; a hop to a thread and back costs 0.1 ms
# Token ids in JSON take up to 8 bytes each, text about 4 per token and escaped text up to 12.
BODY_BYTES_PER_TOKEN = 16
MIN_BODY_BYTES = 1024 * 1024  # several prompts; whatever is in it, reading it takes some 60 ms

T = TypeVar("T")


def max_body_bytes(limits: Limits, session_len: int) -> int:
    needed = max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * session_len)
    return limits.max_body_bytes or needed


@dataclass(frozen=True, slots=True)
class ServedModel:
    spec: ModelSpec
    created: int  # seconds since the epoch
    tokenizer: "Tokenizer"
    engine: Engines
    metrics: Metrics
    tracer: RequestTracer | None = None
    context: Context | None = None  # until an engine was heard of; None: there is one

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def config(self) -> EngineConfig:
        return self.spec.config

    @property
    def limits(self) -> Limits:
        return self.spec.limits

    @property
    def max_body_bytes(self) -> int:
        return max_body_bytes(self.limits, self.info.session_len)

    @property
    def info(self) -> "EngineInfo | Context":
        """What requests are held to."""
        return self.engine.last_info or self.context or self.engine.info

    async def run(self, work: Callable[[], T], size: int) -> T:
        """Do text work at once when `size` is small, in a thread when it would hold up the loop.

        Sizes are characters, tokens or log probabilities: each takes about 0.5 µs.
        """
        return work() if size <= INLINE_SIZE else await asyncio.to_thread(work)

    async def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return await self.run(
            lambda: [self.tokenizer.encode(text, add_special_tokens) for text in texts],
            sum(map(len, texts)),
        )

    async def decode(
        self, token_ids: Sequence[Sequence[int]], skip_special_tokens: bool, param: str
    ) -> list[str]:
        for ids in token_ids:
            self.check_token_ids(ids, param)
        return await self.run(
            lambda: [self.tokenizer.decode(ids, skip_special_tokens) for ids in token_ids],
            sum(map(len, token_ids)),
        )

    async def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[int]:
        """Token ids of a chat, in the checkpoint's template."""
        return await self.run(
            lambda: self.tokenizer.render_chat(
                to_template(messages, self.tokenizer.chat_template),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            ),
            sum(message.size for message in messages),
        )

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """400 when an id lies outside the vocabulary."""
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self.info.vocab_size:
                raise invalid(
                    f"{param} holds token id {token_id}; this model has ids 0 to "
                    f"{self.info.vocab_size - 1}",
                    param,
                )

    def check_text(self, num_characters: int, param: str) -> None:
        """400 when a text is too long for the context even in the longest tokens there are.

        Asked before it is turned into tokens, which takes up to 1.5 s per MiB.
        """
        limit = self.info.session_len * self.tokenizer.longest_token
        if num_characters > limit:
            raise invalid(
                f"this model's context holds {self.info.session_len} tokens, which are at most "
                f"{limit} characters; {param} has {num_characters}",
                param,
                "context_length_exceeded",
            )

    def check_length(self, num_prompt_tokens: int, max_tokens: int | None, param: str) -> None:
        """400 when prompt and answer cannot fit the context together."""
        limit = self.info.session_len
        wanted = num_prompt_tokens + (max_tokens or 1)
        if wanted > limit:
            raise invalid(
                f"this model's context holds {limit} tokens; the prompt has {num_prompt_tokens} "
                f"and {max_tokens or 'at least 1'} more may be generated, {wanted} together",
                param,
                "context_length_exceeded",
            )

    def check_num_sequences(self, num_prompts: int, n: int) -> None:
        """400 when one request has more sequences than one may, or than can ever wait at once."""
        limits = {
            "max_sequences_per_request": self.limits.max_sequences,
            "max_waiting_requests": self.config.max_waiting_requests,
        }
        name = min(limits, key=lambda name: limits[name])
        if num_prompts * n > limits[name]:
            raise invalid(
                f"{num_prompts} prompts with n={n} are {num_prompts * n} sequences; one request "
                f"may have {limits[name]} ({name})",
                "n" if num_prompts == 1 else "prompt",
            )

    def check_num_tokens(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        """400 when the sequences of one request can never wait at once; one alone always can."""
        num_tokens = n * sum(map(len, prompts))
        limit = self.config.max_waiting_tokens
        if n * len(prompts) > 1 and num_tokens > limit:
            raise invalid(
                f"{n * len(prompts)} sequences have {num_tokens} prompt tokens together; one "
                f"request may have {limit} (max_waiting_tokens)",
                "n" if len(prompts) == 1 else "prompt",
            )
