"""Bodies of POST /v1/chat/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from serve_app.errors import invalid
from serve_app.generation import FinishReason
from serve_app.protocol import refused
from serve_app.protocol.logprobs import ChatLogprobs, PromptLogprobs
from serve_app.protocol.messages import Messages
from serve_app.protocol.sampling import SamplingFields
from serve_app.protocol.usage import Usage


class ChatCompletionRequest(SamplingFields):
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {**refused.CHAT, **refused.OTHERS}

    messages: Annotated[
        Messages, Field(min_length=1, description="a list of messages, at least one")
    ]
    max_completion_tokens: Annotated[
        int | None, Field(description="a number of tokens, at least 1")
    ] = None
    max_tokens: Annotated[
        int | None, Field(description="a number of tokens, at least 1 (older name)")
    ] = None
    logprobs: Annotated[bool | None, Field(description="true or false")] = None
    top_logprobs: Annotated[
        int | None, Field(description="a number of alternatives per token, 0 to 20")
    ] = None
    add_generation_prompt: Annotated[bool | None, Field(description="true or false")] = None
    continue_final_message: Annotated[bool | None, Field(description="true or false")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Field(description="an object of the chat template's variables")
    ] = None

    def token_limit(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid("send max_completion_tokens or max_tokens, not both", "max_tokens")
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def num_logprobs(self) -> int | None:
        """Alternatives per token; None when no log probabilities are wanted."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def opens_answer(self) -> bool:
        """Whether the template ends the prompt with the head of an assistant message."""
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "continue_final_message continues the last message and add_generation_prompt "
                "opens a new one; send one of them",
                "add_generation_prompt",
            )
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
