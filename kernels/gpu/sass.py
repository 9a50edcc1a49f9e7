"""Machine code of compiled kernels: registers, stack, and the loop in which the time goes."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+\S")
_BRANCH = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
    assert usage is not None, "cuobjdump tells no registers"
    return int(usage[1]), int(usage[2])


def disassemble(cubin: bytes) -> list[str]:
    """The lines of code and of labels; takes 0.3 s."""
    lines = _tool("nvdisasm", "-c", cubin).splitlines()
    return [line for line in lines if _LABEL.match(line) or _INSTRUCTION.search(line)]


def _tool(name: str, flag: str, cubin: bytes) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tools / name), flag, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loop(code: Sequence[str]) -> list[str]:
    """Instructions of the loop in which the time goes.

    Of the innermost loops with the most matrix instructions the shortest: others also mask. Without
    matrix instructions the longest.
    """
    labels = {match[1]: i for i, line in enumerate(code) if (match := _LABEL.match(line))}
    branches = [(i, match[1]) for i, line in enumerate(code) if (match := _BRANCH.search(line))]
    # A branch to itself follows the last EXIT.
    spans = [(labels[label], i + 1) for i, label in branches if labels[label] < i - 1]
    loops = [
        [line for line in code[start:end] if not _LABEL.match(line)]
        for start, end in spans
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans)
    ]
    most = max(map(_num_products, loops), default=0)
    if most == 0:
        return max(loops, key=len, default=[])
    return min((loop for loop in loops if _num_products(loop) == most), key=len)


def count(opcode: str, code: Sequence[str]) -> int:
    """HMMA is not HGMMA, nor HFMA2.MMA."""
    return sum(bool(re.search(rf"\s{opcode}\b", line)) for line in code)


def _num_products(loop: Sequence[str]) -> int:
    return count("[HIQ]G?MMA", loop)
