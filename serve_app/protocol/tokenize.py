"""Bodies of POST /tokenize and POST /detokenize."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from serve_app.errors import invalid
from serve_app.protocol.messages import Messages
from serve_app.protocol.strict import Name, Strict, TokenIds


class TokenizeRequest(Strict):
    """A prompt or messages. Special tokens are added to a prompt unless told otherwise."""

    model: Annotated[Name | None, Field(description="the name of the served model")] = None
    prompt: Annotated[str | None, Field(description="a string")] = None
    messages: Annotated[Messages | None, Field(description="a list of messages")] = None
    add_special_tokens: Annotated[bool | None, Field(description="true or false")] = None
    add_generation_prompt: Annotated[bool | None, Field(description="true or false")] = None
    continue_final_message: Annotated[bool | None, Field(description="true or false")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Field(description="an object of the chat template's variables")
    ] = None
    return_token_strs: Annotated[bool | None, Field(description="true or false")] = None

    def check(self) -> None:
        """One of prompt and messages, with the fields that go with it."""
        if (self.prompt is None) == (self.messages is None):
            raise invalid("send prompt or messages, one of them", "prompt")
        foreign = _CHAT_ONLY if self.messages is None else ("add_special_tokens",)
        for field in foreign:
            if getattr(self, field) is not None:
                with_what = "messages" if self.messages is None else "a prompt"
                raise invalid(f"{field} goes with {with_what}", field)


_CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    model: Annotated[Name | None, Field(description="the name of the served model")] = None
    tokens: Annotated[TokenIds, Field(description="a list of token ids")]


class DetokenizeResponse(BaseModel):
    prompt: str
