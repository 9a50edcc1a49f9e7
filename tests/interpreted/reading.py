"""What on a GPU would wait for it: the host asking for a tensor's values."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

P = ParamSpec("P")
R = TypeVar("R")
aten = torch.ops.aten

READING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)


class _NoReading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func.overloadpacket not in READING, f"{func} reads a tensor"
        return func(*args, **(kwargs or {}))


def reading_nothing(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which fails where it reads a tensor."""

    @wraps(function)
    def watched(*args: P.args, **kwargs: P.kwargs) -> R:
        with _NoReading():  # type: ignore[no-untyped-call]
            return function(*args, **kwargs)

    return watched
