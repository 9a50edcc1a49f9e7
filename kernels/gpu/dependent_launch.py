"""Programmatic dependent launch: a kernel starts while the one before it in the stream ends.

From sm_90 on. A kernel launched so may run until its `gdc_wait` before its inputs are written: it
computes addresses and brings weights to L2, which no kernel writes. `gdc_launch_dependents` lets
the next one start. Between kernels of a few microseconds, as in a decode step, that hides the
launch and the first wait for memory; every kernel launched so must wait, or the one after the
next could overtake it.

Whether it pays, and works inside CUDA graphs, is measured: configs/kernels says so for a GPU under
"dependent_launch", and without that it is off.
"""

from typing import Any

import torch

from kernels.gpu import tiles
from kernels.gpu.chip import chip_of
from kernels.gpu.compile import CompileCase


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on this device are launched so."""
    tuned = tiles.lookup("dependent_launch")
    if tuned is None or device.type != "cuda":  # the interpreter knows no such launch
        return False
    return bool(tuned["on"]) and chip_of(device).capability >= 90


def launch_options(pdl: bool) -> dict[str, Any]:
    """Triton's; a PDL that is off needs none, which the interpreter would not know."""
    return {"launch_pdl": True} if pdl else {}


def candidates(kernel: str) -> list[tiles.Tile]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [{"on": 1}] if chip_of(device).capability >= 90 else []


def tile_case(kernel: str, key: tiles.Key, tile: tiles.Tile) -> CompileCase:
    """One of those that it changes; the others compile when they are first launched."""
    from kernels.gpu import norm

    return next(case for case in norm.compile_cases() if case.constants["PDL"])
