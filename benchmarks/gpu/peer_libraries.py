"""Takes Marlin and FlashAttention-3 out of a wheel of vLLM, small enough to carry to a GPU.

    pip download vllm==0.24.0 --no-deps --dest WHEELS
    python -m benchmarks.gpu.peer_libraries WHEELS/vllm-0.24.0-*.whl local/peers

vLLM 0.20 to 0.26 are built for torch 2.11. Without the code for other GPUs than Hopper and
compressed, 264 MB of libraries become 34 MB. `make gpu-bench` looks for them in local/peers, which
git ignores, or where `--peer-libraries` says.
"""

import argparse
import lzma
import struct
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

LIBRARIES = ("_C_stable_libtorch.abi3.so", "_vllm_fa3_C.abi3.so")  # Marlin; FlashAttention-3
CAPABILITY = 90
# Of a bundle of one kernel file for several GPUs: magic, version, bytes of this header and of all
# entries; of an entry: kind, bytes of this header and of the code, capability.
BUNDLE = struct.Struct("<4sHHQ")
MAGIC, VERSION = b"\x50\xed\x55\xba", 1
ENTRY = struct.Struct("<HxxIQ12xI")
PTX, MACHINE_CODE = 1, 2


def pack(wheel: Path, folder: Path) -> list[Path]:
    """The libraries as folder/NAME.xz."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = []
    with ZipFile(wheel) as content:
        for member in content.namelist():
            name = Path(member).name
            if name in LIBRARIES:
                packed.append(folder / f"{name}.xz")
                packed[-1].write_bytes(lzma.compress(strip(content.read(member)), preset=6))
    if missing := set(LIBRARIES) - {path.stem for path in packed}:
        raise SystemExit(f"{wheel} has no {', '.join(sorted(missing))}")
    return packed


def strip(library: bytes, capability: int = CAPABILITY) -> bytes:
    """Bundles keep only what this capability runs; zeros fill what the rest took."""
    kept = bytearray(library)
    start = library.find(MAGIC)
    while start >= 0:
        _, version, header, size = BUNDLE.unpack_from(library, start)
        end = start + header + size
        if version != VERSION or header != BUNDLE.size or end > len(library):
            end = start + len(MAGIC)  # the same four bytes by chance
        else:
            entries = list(_entries(library, start + header, end))
            content = b"".join(_wanted(entries, capability))
            BUNDLE.pack_into(kept, start, MAGIC, version, header, len(content))
            kept[start + header : end] = content.ljust(size, b"\0")
        start = library.find(MAGIC, end)
    return bytes(kept)


def _wanted(entries: list[tuple[int, int, bytes]], capability: int) -> list[bytes]:
    """Its machine code, else the newest PTX that the driver compiles for it: Marlin's repacking has
    no other. A bundle for other GPUs keeps its smallest entry, since none is known to be empty.
    """
    if exact := [code for kind, of, code in entries if (kind, of) == (MACHINE_CODE, capability)]:
        return exact
    ptx = [(of, code) for kind, of, code in entries if kind == PTX and of <= capability]
    return [max(ptx)[1]] if ptx else [min((code for *_, code in entries), key=len)]


def _entries(library: bytes, start: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Kind, capability, and header and code."""
    while start < end:
        kind, header, size, capability = ENTRY.unpack_from(library, start)
        yield kind, capability, library[start : start + header + size]
        start += header + size


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.peer_libraries",
        description="Take Marlin and FlashAttention-3 out of a wheel of vLLM.",
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for path in pack(arguments.wheel, arguments.folder):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
