"""Strict: what every request body is made of.

JSON types as declared, and lists that stop at their first wrong item: pydantic otherwise keeps an
error per item, 7 s and 380 MB for a body of 200k wrong ones, on the loop every stream shares.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_OBJECT_KEYS = 1024  # objects have no fail_fast


class Strict(BaseModel):
    """No "1" for 1, no 1.0 for an integer, no NaN, no unknown key."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _token_id_keys(value: Any) -> Any:
    """JSON's keys are strings: those of token ids become integers, if they are not too many."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_OBJECT_KEYS:
        raise PydanticCustomError(
            "too_long", "an object of at most {most} keys", {"most": MAX_OBJECT_KEYS}
        )
    return {int(key) if len(key) < 10 and key.isdecimal() else key: value[key] for key in value}


Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True)]
Biases = Annotated[dict[int, float], BeforeValidator(_token_id_keys)]
