"""What an independent tool is asked to do, as a file that crosses into its environment.

It knows no tool. Every peer module has `quantize(job)`, which writes the tool's own checkpoint;
`dequantize(path)`, which returns that checkpoint's linears as the tool itself reads them, float32
[N, K] by module name; and `PACKAGES`, whose versions a record names.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model to quantise by a `method` of the peer's own list; its module says which."""

    model: Path
    out: Path
    samples: Path  # a safetensors file: ids int64 [num_samples, num_tokens]
    method: str
    bits: int = 4
    group_size: int = 128  # -1: one group over all inputs
    symmetric: bool = False
    act_order: bool = False
    layout: str = ""  # where the peer writes several
    dtype: str = "bfloat16"

    @classmethod
    def load(cls, path: Path) -> "Job":
        """The job in a file that `save` wrote."""
        values = json.loads(path.read_text())
        paths = {name: Path(values[name]) for name in ("model", "out", "samples")}
        return cls(**(values | paths))

    def save(self, path: Path) -> None:
        values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }
        path.write_text(json.dumps(values))

    def ids(self) -> Tensor:
        """The calibration tokens, int64 [num_samples, num_tokens]."""
        ids: Tensor = load_file(self.samples)["ids"]
        return ids


def save_samples(path: Path, ids: Tensor) -> None:
    """Write calibration tokens [num_samples, num_tokens] where a job's `samples` points."""
    save_file({"ids": ids.long().contiguous()}, path)
