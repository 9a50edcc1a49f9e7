"""Compiling kernels for a GPU that is not here: registers, spills, shared memory, instructions.

Each kernel module lists its `compile_cases()`: every form that the engine launches. What the
compiler makes of them is in instructions.json, by version of Triton and compute capability, so
that a kernel that grew slower shows where no GPU is (tests/test_gpu_compile.py).

    python -m kernels.gpu.compile [--arch 80 --arch 90] [--write-table] [MODULE ...]
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kernels.gpu import tiles
from kernels.gpu.sass import count, disassemble, main_loop, resources

# Here because all launchers import this: multiply and add are one instruction, as they always were.
# Triton 3.9 warns that 3.10 will do so only when it is told.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

TABLE = Path(__file__).with_name("instructions.json")
CAPABILITIES = (80, 89, 90)  # of 89 what 80 cannot do: fp8
# Bytes that a block may have. What fits sm_80, which has 163 KiB, is launched on sm_86 too.
SHARED_LIMITS = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}

Argument = torch.dtype | int | float | None


@dataclass(frozen=True, slots=True)
class CompileCase:
    """A kernel with the types of its run-time arguments, its constants and its launch options."""

    label: str  # unique in its module
    kernel: Any  # triton.runtime.JITFunction
    arguments: tuple[Argument, ...]  # a dtype is a pointer to it; an int also says divisibility
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, launch_pdl
    elements: int = 0  # weights or KV elements per step of the main loop; 0: it is not counted
    min_capability: int = 80  # 90 for what only Hopper has
    max_capability: int = 999  # 89 for what launchers do otherwise from Hopper on


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a case."""

    registers: int  # per thread
    spills: int  # bytes of stack per thread
    shared: int  # bytes per block
    # Of cases with elements only:
    per_element: float = 0.0  # lane instructions of the main loop
    hgmma: int = 0  # instructions for Hopper's matrix units
    hmma: int = 0  # and for those of all GPUs


_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.uint32: "*u32",
    torch.uint64: "*u64",
    torch.bool: "*i1",
}


def compile_case(case: CompileCase, capability: int) -> Compiled:
    """Compiles with the specialisation that a launch would use."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialisation(case)
    source = ASTSource(case.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(case.options))
    cubin = compiled.asm["cubin"]
    registers, stack = resources(cubin)
    found = Compiled(registers=registers, spills=stack, shared=compiled.metadata.shared)
    if not case.elements:
        return found
    code = disassemble(cubin)
    instructions = len(main_loop(code)) * 32 * case.options.get("num_warps", 4)
    return replace(
        found,
        per_element=round(instructions / case.elements, 3),
        hgmma=count("HGMMA", code),
        hmma=count("HMMA", code),
    )


def _specialisation(
    case: CompileCase,
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[Any]]]]:
    """Triton's: pointers and multiples of 16 are marked as such, ones and Nones are constants."""
    names = case.kernel.arg_names
    unspecialised = {p.name for p in case.kernel.params if p.do_not_specialize}
    signature = {}
    constants: dict[tuple[int], Any] = {}
    attributes = {}
    runtime = [name for name in names if name not in case.constants]
    assert len(runtime) == len(case.arguments), (
        f"{case.label}: arguments for {runtime}, not {len(case.arguments)}"
    )
    for name, argument in zip(runtime, case.arguments, strict=True):
        index = (names.index(name),)
        special = name not in unspecialised
        if argument is None or (argument == 1 and special):
            signature[name] = "constexpr"
            constants[index] = argument
            continue
        signature[name] = _type(argument)
        whole = isinstance(argument, int) and argument % 16 == 0 and special
        if isinstance(argument, torch.dtype) or whole:
            attributes[index] = [["tt.divisibility", 16]]
    for name, value in case.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    return {name: signature[name] for name in names}, constants, attributes


def _type(argument: torch.dtype | float) -> str:
    if isinstance(argument, torch.dtype):
        return _POINTERS[argument]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if abs(argument) < 2**31 else "i64"


def modules() -> list[str]:
    """Names of the modules of kernels/gpu that list cases."""
    package = importlib.import_module("kernels.gpu")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(_module(name), "compile_cases")]


def cases(module: str) -> list[CompileCase]:
    """The module's, and one for each of its tiles in configs/kernels."""
    listed: list[CompileCase] = list(_module(module).compile_cases())
    assert len({case.label for case in listed}) == len(listed), f"{module} repeats a label"
    for path in sorted(tiles.FOLDER.glob("*.json")):
        for kernel, tuned in tiles.tables(path).items():
            if tiles.module_of(kernel) == module:
                listed += [_tuned_case(module, kernel, *entry) for entry in tuned.items()]
    return list({case.label: case for case in listed}.values())


def _tuned_case(
    module: str, kernel: str, key: tuple[tuple[str, int | str], ...], tile: tiles.Tile
) -> CompileCase:
    case: CompileCase = _module(module).tile_case(kernel, dict(key), tile)
    named = [f"{name} {value}" for name, value in (*key, *tile.items())]
    return replace(case, label=", ".join([f"{kernel} tuned", *named]))


def _module(name: str) -> Any:
    return importlib.import_module(f"kernels.gpu.{name}")


class CompileError(Exception):
    """What the compiler said."""


@dataclass(frozen=True, slots=True)
class Job:
    """One case to compile, for another process: kernels do not travel, names do."""

    module: str
    label: str
    capability: int

    @property
    def name(self) -> str:
        """In the table."""
        return f"{self.module}: {self.label}"


def jobs(module: str, capabilities: Iterable[int] = CAPABILITIES) -> list[Job]:
    return [
        Job(module, case.label, capability)
        for case in cases(module)
        for capability in capabilities
        if case.min_capability <= capability <= case.max_capability
        and (capability != 89 or case.min_capability == 89)
    ]


def compile_job(job: Job) -> Compiled:
    """Raises CompileError."""
    case = next(case for case in cases(job.module) if case.label == job.label)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the whole PTX, when ptxas fails
            return compile_case(case, job.capability)
    except Exception as error:  # noqa: BLE001 - not all of the compiler's own travel
        raise CompileError(f"{job}: {type(error).__name__}: {error}") from None


def compiling(work: Sequence[Job]) -> Iterator[tuple[Job, "Future[Compiled]"]]:
    """Compiles in as many processes as there are processors."""
    context = multiprocessing.get_context("spawn")  # torch has started threads here
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        yield from [(job, pool.submit(compile_job, job)) for job in work]


def table() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Numbers by Triton's version, capability and Job.name."""
    content: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(TABLE.read_text())
    return content


def write_table(results: dict[Job, Compiled]) -> None:
    """Takes in what was compiled here and drops, for all versions, what is no case any more."""
    import triton

    content = table() if TABLE.exists() else {}
    here = content.setdefault(triton.__version__, {})
    for job, compiled in results.items():
        here.setdefault(str(job.capability), {})[job.name] = asdict(compiled)
    known = {(str(job.capability), job.name) for name in modules() for job in jobs(name)}
    kept = {
        version: {
            capability: {name: row for name, row in rows.items() if (capability, name) in known}
            for capability, rows in by_capability.items()
        }
        for version, by_capability in content.items()
    }
    text = json.dumps(kept, indent=1, sort_keys=True)
    # A line per job.
    text = re.sub(r"{([^{}]+)}", lambda row: "{" + " ".join(row[1].split()) + "}", text)
    TABLE.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel without a GPU.")
    parser.add_argument("modules", nargs="*", help="of kernels/gpu; all of them without")
    parser.add_argument("--arch", action="append", type=int, help="again for several; all without")
    parser.add_argument("--write-table", action="store_true", help=f"into {TABLE.name}")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(modules()):
        parser.error(f"no kernels in {', '.join(unknown)}; there are in {', '.join(modules())}")
    names, capabilities = arguments.modules or modules(), arguments.arch or CAPABILITIES
    work = [job for name in names for job in jobs(name, capabilities)]
    results = {}
    failed = 0
    print(f"{'':70s}  arch  regs spills  shared  wgmma   mma  per element")
    for job, future in compiling(work):
        name = f"{job.name:70s} {job.capability:5d}"
        try:
            found = results[job] = future.result()
        except CompileError as error:
            failed += 1
            print(name, error, flush=True)
            continue
        print(
            f"{name} {found.registers:5d}"
            f" {found.spills:6d} {found.shared:7d} {found.hgmma:6d} {found.hmma:5d}"
            f" {found.per_element:12.2f}",
            flush=True,
        )
    if arguments.write_table:
        write_table(results)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
