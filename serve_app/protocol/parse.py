"""parse: a JSON body to a request model, or an error that names the field and what is allowed."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serve_app.errors import ApiError, invalid, unsupported
from serve_app.protocol.refused import check_surplus, unknown

Model = TypeVar("Model", bound=BaseModel)
UNSUPPORTED = "unsupported_by_this_server"  # the error type by which a validator refuses a value
SHOWN = 60  # characters of an offending value


def parse(
    model: type[Model], body: bytes, refused: Mapping[str, tuple[Any, ...]] | None = None
) -> Model:
    """ApiError 400 on bad JSON, wrong types, and fields that are refused or unknown."""
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise _describe(model, error.errors(include_url=False), body) from None
    check_surplus(request.model_extra or {}, model.model_fields, refused or {})
    return request


def _describe(model: type[BaseModel], errors: list[ErrorDetails], body: bytes) -> ApiError:
    """The error that says most: a refusal first, then the one deepest in the body."""
    error = max(errors, key=lambda found: (found["type"] == UNSUPPORTED, len(found["loc"])))
    if error["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {error['ctx']['error']}", None, "bad_json")
    path = _path(error, json.loads(body))
    if not path:
        return invalid("the body must be a JSON object", None)
    param = "".join(f"[{item}]" if isinstance(item, int) else f".{item}" for item in path)[1:]
    if error["type"] == UNSUPPORTED:
        return unsupported(param, f": {error['msg']}")
    if error["type"] == "extra_forbidden":
        return unknown(param, model.model_fields)
    if error["type"] == "missing":
        return invalid(f"the field {param!r} is missing", param)
    field = model.model_fields.get(str(path[0]))
    what = field.description if field and len(path) == 1 else None
    shown = repr(error["input"])
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
    return invalid(f"{param} must be {what or _requirement(error)}; got {shown}", param)


def _path(error: ErrorDetails, value: Any) -> list[int | str]:
    """Where in the body the error is: its location without pydantic's names of union members."""
    path: list[int | str] = []
    for item in error["loc"]:
        inside_object = isinstance(value, dict) and item in value
        inside_list = isinstance(value, list) and isinstance(item, int) and item < len(value)
        if inside_object or inside_list:
            path.append(item)
            value = value[item]
        elif error["type"] == "missing" and item == error["loc"][-1]:
            path.append(item)
    return path


def _requirement(error: ErrorDetails) -> str:
    """pydantic's "Input should be a valid string" as the end of "… must be"."""
    what = error["msg"].removeprefix("Input should be ")
    return what.replace("a valid i", "an i").replace("a valid", "a")
