"""Fields that clients of other servers send and this one does not act on: refused by name.

A value that asks for what happens anyway is let through (`"store": false`); null counts as absent.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from serve_app.errors import ApiError, invalid, unsupported

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


def check_surplus(
    surplus: Mapping[str, Any], known: Iterable[str], refused: Mapping[str, tuple[Any, ...]]
) -> None:
    """400 for the first field that is refused or unknown; the latter with the nearest known."""
    for name, value in surplus.items():
        if name not in refused:
            raise unknown(name, [*known, *refused])
        if value is not None and not any(_same(value, neutral) for neutral in refused[name]):
            raise unsupported(name, _hint(refused[name]))


def unknown(name: str, known: Iterable[str]) -> ApiError:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return invalid(f"unknown field {name!r}{hint}", name, "unknown_field")


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and bool(value == neutral)  # True is not 1


def _hint(neutral: tuple[Any, ...]) -> str:
    return f"; leave it out or send {neutral[0]!r}" if neutral else ""
