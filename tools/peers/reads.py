"""Whether a tool reads a checkpoint as its format is described:

    PEER/bin/python -m tools.peers.reads TOOL CHECKPOINT

loads it by the tool, compares every linear's weights with tests/dequantized.py, which no tool and
no reader of ours has a part in, and exits with 1 when one differs.
"""

import importlib
import sys
from pathlib import Path

from tests.dequantized import dequantized_weights

TOLERANCE = 1e-6  # of the largest weight: one of the two multiplies in another order


def main(tool: str, path: Path) -> int:
    theirs = importlib.import_module(f"tools.peers.{tool}").dequantize(path)
    expected = dequantized_weights(path)
    worst = 0.0
    for module, weight in expected.items():
        difference = (theirs[module] - weight).abs().max() / weight.abs().max()
        worst = max(worst, float(difference))
    print(f"{tool}: {len(expected)} linears of {path.name}, largest difference {worst:.1e}")
    return int(worst > TOLERANCE or theirs.keys() != expected.keys())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tools.peers.reads TOOL CHECKPOINT")
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
