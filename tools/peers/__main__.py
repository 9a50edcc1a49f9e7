"""Do a job with one tool, and write how long it took: `python -m tools.peers TOOL JOB RESULT`.

JOB is a file of tools/peers/job.py, RESULT a JSON file. TOOL is a module of this package, for our
own quantiser "manta".
"""

import importlib
import json
import sys
import time
from importlib import metadata
from pathlib import Path

from tools.peers.job import Job


def main(tool: str, job_file: Path, result: Path) -> None:
    """Quantise; peak memory is this process's, with what the imports took beside it."""
    module, job = importlib.import_module(f"tools.peers.{tool}"), Job.load(job_file)
    imported, started = peak_memory(), time.monotonic()
    module.quantize(job)
    found = {
        "seconds": time.monotonic() - started,
        "peak_memory": peak_memory(),
        "memory_before": imported,
        "versions": {package: metadata.version(package) for package in module.PACKAGES},
    }
    result.write_text(json.dumps(found, indent=1))


def peak_memory() -> int:
    """Bytes, mapped files included. getrusage's would begin with that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m tools.peers TOOL JOB RESULT")
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
