"""What the settings of several methods have in common."""

import re

from engine.models.hf_config import HFConfig

BITS = (2, 4, 8)
HEADS = ("lm_head", "output")  # the head's names; the second is InternLM2's


def names(keys: HFConfig, key: str) -> tuple[str, ...]:
    """A list of names; empty when it is absent."""
    value = keys.values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise keys.error(key, value, "a list of module names")
    return tuple(value)


def spelt(keys: HFConfig, *spellings: str) -> str:
    """The spelling of a key that is there, the last one when none is."""
    return next((key for key in spellings if key in keys), spellings[-1])


def group_size(keys: HFConfig, key: str) -> int:
    """-1 means one group of all inputs."""
    value = keys.integer(key, minimum=-1)
    if value == 0:
        raise keys.error(key, value, "a number of inputs, or -1 for one group of all")
    return value


def is_named(module: str, listed: tuple[str, ...]) -> bool:
    """Whether a list has the module, one that it lies in, or the end of its name.

    transformers' rule for `modules_to_not_convert`: "mlp.gate" is not "mlp.gate_proj".
    """
    return any(module.endswith(name) or f".{name}." in f".{module}." for name in listed)


def check_pattern(keys: HFConfig, key: str, pattern: str) -> str:
    """The pattern; CheckpointError when it is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise keys.error(key, pattern, f"a regular expression ({error})") from error
    return pattern
