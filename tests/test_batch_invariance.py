"""In bf16, a small int4 model's tokens do not depend on what runs beside it, greedy or seeded.

On CPUs whose int4 kernels multiply a row alike among any others, kernels/cpu; float32 is tested in
test_engine.py, everywhere. torch's dense products and prefill attention may still differ by a
rounding between numbers of rows, which a larger vocabulary can show.
"""

from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from kernels import cpu
from tests.tiny_models import write_servable_model

PROMPTS = [[10 + i, 20, 30, 40 + i, 50, *range(60, 60 + 7 * (i % 3))] for i in range(40)]


@pytest.mark.skipif(cpu.library() is None, reason="no AMX, or installed without a compiler")
@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=1, seed=7, max_tokens=24, ignore_eos=True),
    ],
    ids=["greedy", "seeded"],
)
def test_alone_or_among_forty(
    params: SamplingParams, int8_activations: bool, tmp_path: Path
) -> None:
    model = write_servable_model(
        "llama",
        tmp_path,
        awq_group_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llm = LLM(
        str(model.path),
        dtype="bfloat16",
        num_threads=1,
        max_num_batched_tokens=64,  # prompts are cut into chunks that depend on the others
        enable_prefix_caching=False,
        cache_max_entry_count=300,
        int8_activations=int8_activations,
    )
    together = llm.generate(PROMPTS, params, use_tqdm=False)
    for index in (0, 1, 2, 17, 39):
        alone = llm.generate([PROMPTS[index]], params, use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == together[index].outputs[0].token_ids
