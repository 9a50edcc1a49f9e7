"""The sizing table of docs/deploy.md: `manta plan` for well-known checkpoints, from their configs.

python -m tools.sizing      # puts it into the page
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.models import load_spec
from serve_app.plan import Planner
from serve_app.plan_gpus import known_gpu

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
BEGIN, END = "<!-- sizing: python -m tools.sizing -->\n", "<!-- end of sizing -->\n"
CONTEXT, MAX_GPUS = 8192, 8
GPUS = ("L4-24GB", "L40S-48GB", "A100-80GB", "H100-80GB", "H200-141GB")

# In groups of 128: class, layers, hidden, intermediate, heads, kv heads, vocabulary.
CHECKPOINTS = {
    "Qwen2.5 7B": ("Qwen2ForCausalLM", 28, 3584, 18944, 28, 4, 152064),
    "Llama 3.1 8B": ("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128256),
    "Qwen2.5 14B": ("Qwen2ForCausalLM", 48, 5120, 13824, 40, 8, 152064),
    "Qwen2.5 32B": ("Qwen2ForCausalLM", 64, 5120, 27648, 40, 8, 152064),
    "Llama 3.3 70B": ("LlamaForCausalLM", 80, 8192, 28672, 64, 8, 128256),
    "Qwen2.5 72B": ("Qwen2ForCausalLM", 80, 8192, 29696, 64, 8, 152064),
}


def config_json(name: str) -> dict[str, Any]:
    architecture, layers, hidden, inner, heads, kv_heads, vocabulary = CHECKPOINTS[name]
    return {
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
        },
    }


def table() -> str:
    lines = [
        f"| checkpoint (AWQ) | weights | {' | '.join(GPUS)} |",
        f"|---|---|{'---|' * len(GPUS)}",
    ]
    for name in CHECKPOINTS:
        weights, cells = _cells(name)
        lines.append(f"| {name} | {weights} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(name: str) -> tuple[str, list[str]]:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config_json(name)))
        spec = load_spec(directory)
    config = EngineConfig(model=name, session_len=CONTEXT)
    planner = Planner(spec, config, "cuda")
    plans = [planner.plan(known_gpu(gpu), MAX_GPUS) for gpu in GPUS]
    weights = plans[0].rows[0].weight_bytes
    best = [plan.best for plan in plans]
    cells = ["none" if row is None else f"tp {row.tp}: {row.num_sequences}" for row in best]
    return f"{weights / 1024**3:.0f} GiB", cells


def page() -> str:
    """The page with the table of today."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
