"""Fields that clients of other servers send and this one does not act on: refused by name.

A value that asks for what happens anyway is let through (`"store": false`); null counts as absent.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

# The types of errors by which a validator refuses a field.
UNKNOWN = "unknown_field"
UNSUPPORTED = "unsupported"
MAX_NAME = 64  # characters; a longer name is like none of ours, and comparing it takes long

# Field: the values that ask for nothing.
CHAT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
}
COMPLETIONS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
# Other servers' own fields (vLLM, SGLang, LMDeploy), on both routes.
OTHERS: Mapping[str, tuple[Any, ...]] = {
    "chat_template": (),
    "documents": (),
    "ebnf": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "logprob_token_ids": (),
    "lora_path": (),
    "min_new_tokens": (),
    "mm_processor_kwargs": (),
    "no_stop_trim": (False,),
    "priority": (0,),
    "prompt_embeds": (),
    "regex": (),
    "repetition_detection": (),
    "request_id": (),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
}


def check_fields(
    given: Mapping[str, Any], known: Collection[str], refused: Mapping[str, tuple[Any, ...]]
) -> None:
    """An error for the first field that is refused, or unknown: then with the nearest known."""
    for name, value in given.items():
        if name in known:
            continue
        if name not in refused:
            raise _error(UNKNOWN, name, _nearest(name, [*known, *refused]))
        if value is not None and not any(_same(value, neutral) for neutral in refused[name]):
            raise _error(UNSUPPORTED, name, _hint(refused[name]))


def _error(kind: Any, name: str, hint: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{hint}", {"field": name, "hint": hint})


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1) if len(name) <= MAX_NAME else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and bool(value == neutral)  # True is not 1


def _hint(neutral: tuple[Any, ...]) -> str:
    return f"; leave it out or send {neutral[0]!r}" if neutral else ""
