"""parse: a JSON body to a request model, or an error that names the field and what is allowed.

A body costs at most some 60 ms per MiB, whatever is in it. pydantic's own JSON path takes 2.3 s for
1 MiB of empty lists in a field of several types, so the body becomes plain objects first.
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from serve_app.errors import ApiError, invalid, shown, unsupported
from serve_app.protocol.refused import MAX_NAME, UNKNOWN, UNSUPPORTED

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], body: bytes) -> Model:
    """ApiError 400 on bad JSON, wrong types, and fields that are refused or unknown."""
    try:
        value = from_json(body)
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}", None, "bad_json") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _describe(model, error.errors(include_url=False), value) from None


def _describe(model: type[BaseModel], errors: list[ErrorDetails], body: Any) -> ApiError:
    """The error that says most: a refusal first, then the one deepest in the body."""
    error = max(errors, key=lambda found: (found["type"] == UNSUPPORTED, len(found["loc"])))
    path = _path(error, body)
    if not path:
        return invalid("the body must be a JSON object", None)
    param = "".join(f"[{i}]" if isinstance(i, int) else f".{i[:MAX_NAME]}" for i in path)[1:]
    if error["type"] == UNSUPPORTED:
        return unsupported(param, error["msg"])
    if error["type"] == UNKNOWN:
        return invalid(f"unknown field {param!r}{error['msg']}", param, UNKNOWN)
    if error["type"] == "missing":
        return invalid(f"the field {param!r} is missing", param)
    field = model.model_fields.get(str(path[0]))
    what = field.description if field and len(path) == 1 else None
    return invalid(
        f"{param} must be {what or _requirement(error)}; got {shown(error['input'])}", param
    )


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
    if isinstance(field := error.get("ctx", {}).get("field"), str):
        path.append(field)
    return path


def _requirement(error: ErrorDetails) -> str:
    """pydantic's "Input should be a valid string" as the end of "… must be"."""
    if error["type"] in ("model_type", "dict_type"):
        return "an object"
    what = error["msg"].removeprefix("Input should be ")
    return what.replace("a valid i", "an i").replace("a valid", "a")
