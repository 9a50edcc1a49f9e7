"""Strict: what every request body is made of.

JSON types as declared. Lists stop at their first wrong item and objects at their first surplus
key: pydantic otherwise keeps an error for each, and a body of 400 KB stopped all streams for 1.7 s.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve_app.protocol.refused import check_fields

MAX_BIASES = 1024
MAX_PROMPTS = 1024
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")


class Strict(BaseModel):
    """No "1" for 1, no 1.0 for an integer, no NaN, no key but the fields' names."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",  # check_fields has refused them, with a better message
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": False},
    )
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        if isinstance(value, dict):
            check_fields(value, cls.model_fields, cls.refused)
        return value


def _token_id_keys(value: Any) -> Any:
    """JSON's keys are strings: those of token ids become integers, if they are not too many.

    Only as integers are written: "1", "01" and "\u0661" would be one key, and a bias be lost.
    """
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("too_long", "an object of at most {n} keys", {"n": MAX_BIASES})
    return {int(key) if _TOKEN_ID.fullmatch(key) else key: value[key] for key in value}


Name = Annotated[str, Field(max_length=256)]
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)]
Biases = Annotated[dict[int, float], BeforeValidator(_token_id_keys)]
