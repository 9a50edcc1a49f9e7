"""Packed weights between a GPU and the node's files: down to be stored, up to be computed with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.weights.packed_file import Packed

STAGE_BYTES = 1 << 26


def to_host(values: Iterable[tuple[str, Packed]]) -> Iterator[tuple[str, Packed]]:
    for name, value in values:
        yield name, _moved(value, Tensor.cpu)


def upload(values: Mapping[str, Packed], device: str) -> dict[str, Packed]:
    """Copies on the device, made one after the other."""
    send = _Stages(device).send
    return {name: _moved(value, send) for name, value in values.items()}


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or a packed weight with all of its tensors, moved."""
    if isinstance(value, Tensor):
        return move(value)
    if not is_dataclass(value):
        return value
    parts = {part.name: _moved(getattr(value, part.name), move) for part in fields(value)}
    return replace(value, **parts)  # type: ignore[type-var]


class _Stages:
    """Two pinned buffers, of which one is filled from the file while the other is sent.

    A copy out of mapped pages would wait for the driver's own, smaller buffers.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._buffers = [
            torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)
        ]
        self._sent: list[torch.cuda.Event | None] = [None, None]

    def send(self, tensor: Tensor) -> Tensor:
        """A copy on the device; later work there finds it whole."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = tensor.reshape(-1).view(torch.uint8), copy.view(-1).view(torch.uint8)
        for start in range(0, len(source), STAGE_BYTES):
            piece = slice(start, start + STAGE_BYTES)
            self._send(source[piece], target[piece])
        return copy

    def _send(self, source: Tensor, target: Tensor) -> None:
        buffer, sent = self._buffers.pop(0), self._sent.pop(0)
        if sent is not None:
            sent.synchronize()
        staged = buffer[: len(source)].copy_(source)
        target.copy_(staged, non_blocking=True)
        event = None
        if self._on_gpu:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._buffers.append(buffer)
        self._sent.append(event)
