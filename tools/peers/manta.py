"""Our own quantiser behind the peers' interface. Methods: "rtn", "awq" and "gptq".

Layouts: "awq", "gptq" and "compressed-tensors".
"""

from typing import cast

import torch

from engine.quantize import recipes
from engine.quantize.job import LocalStates, QuantizationJob
from engine.quantize.output import Format
from engine.quantize.source import Source
from tools.peers.job import Job

PACKAGES = ("manta-serve", "torch")
BATCH_SIZE = 8  # samples that are computed at once


def quantize(job: Job) -> None:
    """As `manta lite` does with its defaults."""
    groups = job.group_size, job.symmetric, cast(Format, job.layout)
    if job.method == "gptq":
        recipe = recipes.gptq(*groups, desc_act=job.act_order)
    else:
        recipe = {"rtn": recipes.rtn, "awq": recipes.awq}[job.method](*groups)
    QuantizationJob(
        source=Source.open(job.model),
        work_dir=job.out,
        method=recipe.method,
        output=recipe.output,
        settings=recipe.settings,
        samples=job.ids() if recipe.calibrates else None,
        states=LocalStates(BATCH_SIZE),
        dtype=torch.float32,
        overwrite=True,
        show_progress=False,
    ).run()
