"""ChatTemplate: the checkpoint's own Jinja template, and what it can express.

transformers renders (its sandbox, its filters); this file decides what may be passed and turns
the template's complaints into errors of the request. Knows no token ids.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointError, InvalidRequestError

Message = Mapping[str, Any]


class ChatTemplate:
    """Made once per tokenizer; `None` in place of one means the checkpoint has no template."""

    def __init__(self, hf: PreTrainedTokenizerFast) -> None:
        self._hf = hf
        self._source: str = hf.get_chat_template()
        reserved = inspect.signature(hf.apply_chat_template).parameters.keys()
        self.variables = _free_variables(self._source) - reserved - _OURS

    def mentions(self, name: str) -> bool:
        """Whether the template's text contains `name` as a word: a role, a message field."""
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Message] | None = None,
    ) -> str:
        """The prompt's text. `variables` are what the API calls chat_template_kwargs.

        `tools` are function signatures in OpenAI's form; a template without a place for them
        leaves them out.

        InvalidRequestError when the template refuses the messages or knows no such variable.
        """
        variables = variables or {}
        for name in variables.keys() - self.variables:
            known = ", ".join(sorted(self.variables)) or "none"
            raise InvalidRequestError(
                f"this model's chat template has no variable {name!r}; it has: {known}",
                "chat_template_kwargs",
            )
        try:
            text = self._hf.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            # Templates index and concatenate what the client sent, so any of these is its fault.
            raise InvalidRequestError(
                f"this model's chat template refuses the messages: {error}", "messages"
            ) from error
        assert isinstance(text, str)
        return text


# Names that every template may read and that are not the client's to set through kwargs.
_OURS = {"messages", "raise_exception", "strftime_now", "bos_token", "eos_token", "pad_token"} | {
    "unk_token",
    "additional_special_tokens",
}


def _free_variables(source: str) -> set[str]:
    """Names the template reads from outside."""
    # `{% generation %}` is transformers' own tag and binds nothing.
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(source))
    except TemplateError as error:
        raise CheckpointError(f"the tokenizer's chat template is not valid: {error}") from error
