"""Write tests/fixtures/quantized: tiny checkpoints of real tools, and how the tools read them.

    python -m tools.quantized_fixtures PEER [NAME ...]

in an environment that has the peer (tools/peers). Each fixture is a random model of two layers,
quantised and saved by the tool, beside `expected.safetensors`: the dequantised weight of one
linear, and logits and greedy tokens of transformers' float32 model over the tool's own
dequantised weights. `made_by.json` says which versions made it.
"""

import argparse
import importlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny_models import write_tiny_model, write_tokenizer
from tools.peers.job import Job, save_samples

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "quantized"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
KEPT_LINEAR = "model.layers.1.self_attn.k_proj"  # the logits tell of the others
NUM_GREEDY = 8


@dataclass(frozen=True, slots=True)
class Fixture:
    """What is quantised, by whom and how; `job` are Job's settings, `model` the config's."""

    peer: str
    family: str
    job: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)


def int4(method: str, **settings: Any) -> dict[str, Any]:
    return {"method": method, "group_size": 32, **settings}


ALL = {
    "ct-int4-sym": Fixture("llmcompressor", "llama", int4("rtn", symmetric=True)),
    "ct-int4-asym": Fixture("llmcompressor", "qwen2", int4("awq")),
    "ct-int4-channel": Fixture(
        "llmcompressor", "mistral", int4("gptq", symmetric=True) | {"group_size": -1}
    ),
    "ct-int4-act-order": Fixture(
        "llmcompressor", "llama", int4("gptq", symmetric=True, act_order=True)
    ),
    "ct-w8a16": Fixture("llmcompressor", "llama", int4("rtn", symmetric=True, bits=8)),
    "ct-w8a8-int8": Fixture("llmcompressor", "qwen3", {"method": "W8A8"}),
    "ct-fp8-dynamic": Fixture("llmcompressor", "llama", {"method": "FP8_DYNAMIC"}),
    "ct-fp8-static": Fixture("llmcompressor", "llama", {"method": "FP8"}),
    "ct-fp8-block": Fixture("llmcompressor", "llama", {"method": "FP8_BLOCK"}),
    "gptq-v1-sym": Fixture("gptqmodel", "llama", int4("gptq", layout="gptq", symmetric=True)),
    "gptq-v1-act-order": Fixture(
        "gptqmodel", "qwen2", int4("gptq", layout="gptq", symmetric=True, act_order=True)
    ),
    "gptq-v1-channel": Fixture(
        "gptqmodel", "llama", int4("gptq", layout="gptq", symmetric=True) | {"group_size": -1}
    ),
    "gptq-v1-asym": Fixture("gptqmodel", "llama", int4("gptq", layout="gptq")),
    "gptq-v2-asym": Fixture("gptqmodel", "qwen3", int4("gptq", layout="gptq_v2")),
    "gptq-v2-asym-act-order": Fixture(
        "gptqmodel", "llama", int4("gptq", layout="gptq_v2", act_order=True)
    ),
    "gptqmodel-awq-gemm": Fixture(
        "gptqmodel", "llama", int4("awq", layout="gemm"), {"num_key_value_heads": 4}
    ),
    "autoawq-gemm": Fixture(
        "autoawq", "llama", int4("awq", layout="gemm"), {"num_key_value_heads": 4}
    ),
    "autoawq-gemv": Fixture(
        "autoawq", "qwen2", int4("awq", layout="gemv"), {"num_key_value_heads": 4}
    ),
    "bnb-nf4": Fixture("bitsandbytes", "qwen2", {"method": "nf4"}),
    "bnb-nf4-double": Fixture("bitsandbytes", "llama", {"method": "nf4-double"}),
    "bnb-int8": Fixture("bitsandbytes", "llama", {"method": "int8"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write fixtures of a peer that is installed here.")
    parser.add_argument("peer", choices=sorted({fixture.peer for fixture in ALL.values()}))
    parser.add_argument("names", nargs="*", help="those of the peer's fixtures; all by default")
    arguments = parser.parse_args()
    for name, fixture in ALL.items():
        if fixture.peer == arguments.peer and name in (arguments.names or ALL):
            make(name, fixture)


def make(name: str, fixture: Fixture) -> None:
    """Write tests/fixtures/quantized/NAME."""
    peer, out = importlib.import_module(f"tools.peers.{fixture.peer}"), FIXTURES / name
    with tempfile.TemporaryDirectory() as folder:
        source, samples, made = (Path(folder) / part for part in ("model", "samples", "out"))
        write_tokenizer(source)  # some tools want one, though they are given token ids
        write_tiny_model(fixture.family, source, **{**SIZES, **fixture.model})
        save_samples(samples, _random_ids(16, 32))
        peer.quantize(Job(model=source, out=made, samples=samples, **fixture.job))
        weights = peer.dequantize(made)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "quantize_config.json"):
            if (made / file).exists():
                shutil.copy(made / file, out)
    save_file(expected(out, weights), out / "expected.safetensors")
    versions = {package: metadata.version(package) for package in peer.PACKAGES}
    (out / "made_by.json").write_text(json.dumps(versions, indent=1) + "\n")
    print(name, sum(file.stat().st_size for file in out.iterdir()), "bytes")


@torch.inference_mode()
def expected(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits and greedy tokens of a float32 model of the checkpoint's other tensors."""
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float().eval()
    stored = load_file(path / "model.safetensors")
    values = {name: stored[name] for name in model.state_dict() if name in stored}
    values |= {f"{name}.weight": weight for name, weight in weights.items()}
    model.load_state_dict({name: value.float() for name, value in values.items()})
    assert len(weights) == 7 * config.num_hidden_layers, "not every linear was quantised"
    model.generation_config.eos_token_id = None  # a fixed number of tokens
    model.generation_config.pad_token_id = 0
    ids = _random_ids(2, 12)
    generated = model.generate(ids, max_new_tokens=NUM_GREEDY, do_sample=False)
    return {
        "input_ids": ids,
        "logits": model(ids).logits.contiguous(),
        "greedy": generated[:, ids.shape[1] :].contiguous(),
        KEPT_LINEAR: weights[KEPT_LINEAR].contiguous(),
    }


def _random_ids(num_samples: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(3, SIZES["vocab_size"], (num_samples, num_tokens), generator=generator)


if __name__ == "__main__":
    main()
