"""Our compressed-tensors checkpoints in transformers, which reads them by the code of that name."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from engine.models import load_spec
from engine.models.layout import layer_linears
from engine.quantize import recipes
from engine.quantize.job import QuantizationJob
from engine.quantize.output import Format
from engine.quantize.recipes import Recipe
from engine.quantize.source import Source
from engine.weights.checkpoint import Checkpoint
from engine.weights.stored import read_dense
from tests.paged_decoding import PagedDecoder
from tests.tiny_models import tiny_model

PROMPT = [5, 17, 42, 3, 11, 60, 33, 8]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
FORM: Format = "compressed-tensors"
RECIPES = {
    "int4 with zeros": recipes.rtn(32, False, FORM),
    "int4 without": recipes.rtn(64, True, FORM),
    "int4 of one group": recipes.gptq(-1, True, FORM),
    "int4 AWQ": recipes.awq(32, False, FORM),
    "int4 GPTQ": recipes.gptq(32, True, FORM),
    "int8": recipes.smooth_quant("int8", 0.5),
    "fp8": recipes.smooth_quant("fp8", 0.5),
}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # to have it dense
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", RECIPES)
def test_transformers_reads_what_we_read(name: str, family: str, tmp_path: Path) -> None:
    path = quantized(RECIPES[name], family, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    assert_same_weights(path, theirs)
    for module in theirs.modules():
        module.quantization_enabled = False  # of activations, which ours leaves as they are
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    found = PagedDecoder(path).logits(PROMPT)
    assert float((found - expected).abs().max() / expected.std()) < 4e-3  # fp16's weights


def assert_same_weights(path: Path, theirs: torch.nn.Module) -> None:
    """Of all linears: theirs are rounded to the dtype of the scales, ours are not."""
    with Checkpoint(path) as checkpoint:
        linears = layer_linears(load_spec(path), 1)
        for linear in (*linears.qkv, linears.o, linears.gate, linears.up, linears.down):
            scale = checkpoint.read(f"{linear.module}.weight_scale")
            ours = read_dense(checkpoint, linear).to(scale.dtype)
            assert torch.equal(ours.float(), theirs.get_parameter(f"{linear.module}.weight"))


def quantized(recipe: Recipe, family: str, out: Path) -> Path:
    source = tiny_model(family, **SIZES).path
    generator = torch.Generator().manual_seed(0)
    QuantizationJob(
        source=Source.open(source),
        work_dir=out,
        method=recipe.method,
        output=recipe.output,
        settings=recipe.settings,
        samples=torch.randint(3, 131, (4, 32), generator=generator) if recipe.calibrates else None,
        show_progress=False,
    ).run()
    return out
