"""Known GPUs, as data: the memory their driver reports and the bandwidth their maker states."""

from dataclasses import dataclass

from engine.errors import ConfigError
from serve_app.serve_config import nearest

MiB = 1024**2


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one GPU, or of a machine."""

    name: str
    num_bytes: int
    bandwidth: float | None  # bytes per second; None: not known


# MiB as nvidia-smi shows them, GB/s of the SXM form where there are several.
_GPUS = {
    "T4-16GB": (15360, 320),
    "L4-24GB": (23034, 300),
    "A10-24GB": (23028, 600),
    "RTX3090-24GB": (24576, 936),
    "RTX4090-24GB": (24564, 1008),
    "RTX5090-32GB": (32607, 1792),
    "A40-48GB": (46068, 696),
    "A6000-48GB": (49140, 768),
    "L40S-48GB": (46068, 864),
    "A100-40GB": (40960, 1555),
    "A100-80GB": (81920, 2039),
    "H100-80GB": (81559, 3350),
    "H200-141GB": (143771, 4800),
    "B200-180GB": (183359, 8000),
}
_UNITS = {"GiB": 1024**3, "GB": 1000**3, "MiB": MiB, "MB": 1000**2, "TiB": 1024**4}


def known_gpu(name: str) -> Memory:
    if name not in _GPUS:
        raise ConfigError(
            f"--gpu {name!r} is not known; {nearest(name, _GPUS)} Another one is described by "
            "--memory 80GiB --bandwidth 3350"
        )
    mib, gb_per_s = _GPUS[name]
    return Memory(name, mib * MiB, gb_per_s * 1e9)


def read_size(text: str) -> int:
    """Bytes of `80GiB`."""
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            try:
                number = float(text.removesuffix(unit))
            except ValueError:
                break
            if number > 0:
                return int(number * factor)
    raise ConfigError(f"--memory takes a size such as 80GiB ({', '.join(_UNITS)}), got {text!r}")
