"""Bodies of POST /v1/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, Discriminator, Field, Tag

from serve_app.generation import FinishReason
from serve_app.protocol import refused
from serve_app.protocol.logprobs import CompletionLogprobs, PromptLogprobs
from serve_app.protocol.sampling import SamplingFields
from serve_app.protocol.strict import MAX_PROMPTS, Texts, TokenIdLists, TokenIds
from serve_app.protocol.usage import Usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def _shape(prompt: Any) -> str | None:
    """Which of the four types a prompt means to be, by its first item: only that one is tried."""
    first = prompt[0] if prompt and isinstance(prompt, list) else prompt
    shape = {str: "text", int: "tokens", list: "token lists"}.get(type(first))
    return "texts" if isinstance(prompt, list) and (shape == "text" or not prompt) else shape


class CompletionRequest(SamplingFields):
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {**refused.COMPLETIONS, **refused.OTHERS}

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Texts, Tag("texts")]
        | Annotated[TokenIds, Tag("tokens")]
        | Annotated[TokenIdLists, Tag("token lists")],
        Discriminator(_shape),
        Field(
            description="a string, a list of strings, token ids, or a list of lists of them, "
            f"{MAX_PROMPTS} at most"
        ),
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
