"""One run: every kernel and the engine checked, then timed beside their peers, in nine minutes.

    python -m benchmarks.gpu [STAGE ...]   on a GPU: gpu.json in $OUT or benchmarks/results
    python -m benchmarks.gpu tune          writes configs/kernels/<gpu>.json
    python -m benchmarks.gpu --rehearse    the same stages on tiny shapes, without a GPU

It needs torch, triton, transformers, safetensors and numpy, no network, and neither Ray nor
FastAPI. With names of stages only those run, and the others' numbers stay.
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import peers, stages, summary
from benchmarks.gpu.bench import Report

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "kernels"
RESULTS = Path(__file__).resolve().parents[1] / "results"
PEER_LIBRARIES = Path(__file__).resolve().parents[2] / "local" / "peers"


def main() -> int:
    arguments = _arguments()
    names = arguments.stages or [stage.name for stage in stages.STAGES]
    os.environ[peers.FOLDER] = str(arguments.peer_libraries)
    if arguments.in_process:
        stages.run_here(names, arguments.json, arguments.deadline, arguments.rehearse)
        return 0
    if not arguments.rehearse:
        return _run(names, arguments.out, fresh=not arguments.stages)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.json or Path(folder) / "stages.json"
        return _rehearse(arguments.stages or [*names, "tune"], path)


def _run(names: list[str], out: Path, fresh: bool) -> int:
    """The record is out/gpu.json, every number behind it out/gpu/stages.json."""
    path = out / "gpu" / "stages.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        path.unlink(missing_ok=True)
    if "tune" in names and "ceilings" not in names:
        names = ["ceilings", *names]
    report = stages.run_all(names, path, False, lambda report: summary.save(report, out))
    if "tune" in names and report["tune"].get("kernels"):
        from benchmarks.gpu.tune import write

        for folder in {CONFIGS, path.parent}:
            print(f"written to {write(report, folder)}")
    summary.show(report)
    print(f"written to {out / 'gpu.json'} and {path}")
    return 0 if _is_right(report, names) else 1


def _rehearse(names: list[str], path: Path) -> int:
    report = stages.run_all(names, path, True, lambda report: None)
    summary.save(report, path.parent)
    summary.show_stages(report)
    return 0 if _is_right(report, names) else 1


def _is_right(report: Report, names: list[str]) -> bool:
    """Every stage ran to its end, without an error and within its references' limits."""
    sections = [report.get(name, {}) for name in names]
    return all(
        section.get("ended") == "complete"
        and not section.get("errors")
        and all(check["ok"] for check in section.get("checks", {}).values())
        for section in sections
    )


def _arguments() -> argparse.Namespace:
    known = [stage.name for stage in (*stages.STAGES, stages.TUNE)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Check and time Manta on a GPU."
    )
    parser.add_argument(
        "stages", nargs="*", help=f"of {', '.join(known)}; without any all but tune"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, in the interpreter")
    out = Path(os.environ.get("OUT", RESULTS))
    parser.add_argument("--out", type=Path, default=out, help="folder of gpu.json")
    libraries = Path(os.environ.get(peers.FOLDER, PEER_LIBRARIES))
    parser.add_argument(
        "--peer-libraries", type=Path, default=libraries,
        help="folder that benchmarks.gpu.peer_libraries filled",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=math.inf, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.stages if name not in known]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
    if not (arguments.rehearse or arguments.in_process or torch.cuda.is_available()):
        parser.error("torch sees no GPU; --rehearse runs all stages on tiny shapes without one")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
