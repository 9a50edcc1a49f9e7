"""Compiling kernels for a GPU that is not here: registers, spills, shared memory, instructions.

Each kernel module lists its `compile_cases()`: every form that the engine launches.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

Argument = torch.dtype | int | float | None


@dataclass(frozen=True, slots=True)
class CompileCase:
    """A kernel with the types of its run-time arguments, its constants and its launch options."""

    label: str  # unique
    kernel: Any  # triton.runtime.JITFunction
    arguments: tuple[Argument, ...]  # a dtype is a pointer to it; an int also says divisibility
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, launch_pdl
    elements: int = 0  # weights or KV elements per step of the main loop; 0: it is not counted
    min_capability: int = 80  # 90 for what only Hopper has
