"""ServedModel: everything a route needs of the one model behind it.

Text to token ids without blocking the loop, the limits requests are held to, and the engine.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from serve_app.async_engine import AsyncEngine
from serve_app.errors import ApiError, invalid
from serve_app.metrics import Metrics

if TYPE_CHECKING:
    from engine.executor import EngineInfo
    from engine.tokenizer import Tokenizer

INLINE_SIZE = 2000  # takes about 1 ms; a hop to a thread and back costs 0.1 ms

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_bytes: int
    max_sequences: int  # prompts × n of one request


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    created: int  # seconds since the epoch
    tokenizer: "Tokenizer"
    engine: AsyncEngine
    metrics: Metrics
    limits: Limits

    @property
    def info(self) -> "EngineInfo":
        return self.engine.info

    def check_name(self, name: str) -> None:
        """404 for any other model than this one."""
        if name != self.name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

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
        self, token_ids: Sequence[Sequence[int]], skip_special_tokens: bool
    ) -> list[str]:
        return await self.run(
            lambda: [self.tokenizer.decode(ids, skip_special_tokens) for ids in token_ids],
            sum(map(len, token_ids)),
        )

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[int]:
        """Token ids of a chat, in the checkpoint's template."""
        return await self.run(
            lambda: self.tokenizer.render_chat(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            ),
            sum(len(message.get("content") or "") for message in messages),
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

    def check_length(self, num_prompt_tokens: int, max_tokens: int | None, param: str) -> None:
        """400 when prompt and answer cannot fit the context together."""
        limit = self.info.session_len
        wanted = num_prompt_tokens + (max_tokens or 1)
        if num_prompt_tokens == 0:
            raise invalid("the prompt is empty; it needs at least one token", param)
        if wanted > limit:
            raise invalid(
                f"this model's context holds {limit} tokens; the prompt has {num_prompt_tokens} "
                f"and {max_tokens or 'at least 1'} more may be generated, {wanted} together",
                param,
                "context_length_exceeded",
            )

    def check_num_sequences(self, num_prompts: int, n: int) -> None:
        """400 when one request asks for more sequences than one request may."""
        if num_prompts * n > self.limits.max_sequences:
            raise invalid(
                f"{num_prompts} prompts with n={n} are {num_prompts * n} sequences; one request "
                f"may have {self.limits.max_sequences}",
                "n" if num_prompts == 1 else "prompt",
            )
