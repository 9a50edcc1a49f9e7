"""Bodies of POST /v1/completions."""

from typing import Annotated, Literal, cast

from pydantic import BaseModel, Field

from serve_app.generation import FinishReason
from serve_app.protocol.logprobs import CompletionLogprobs, PromptLogprobs
from serve_app.protocol.sampling import SamplingFields
from serve_app.protocol.strict import Texts, TokenIdLists, TokenIds
from serve_app.protocol.usage import Usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(SamplingFields):
    prompt: Annotated[
        str | Texts | TokenIds | TokenIdLists,
        Field(description="a string, a list of strings, token ids, or a list of lists of them"),
    ]
    max_tokens: Annotated[int | None, Field(description="a number of tokens, at least 1")] = None
    logprobs: Annotated[
        int | None, Field(description="a number of alternatives per token, 0 to 20")
    ] = None
    echo: Annotated[bool | None, Field(description="true or false")] = None
    add_special_tokens: Annotated[bool | None, Field(description="true or false")] = None

    def prompt_list(self) -> list[str] | list[list[int]]:
        """One entry per prompt; all are text or all are token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str] | list[list[int]], self.prompt)


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
