"""Tiny checkpoints whose linears are stored in any format, with the model they stand for.

The weights are random in the format itself; the transformers model takes what they mean.
"""

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.stored_formats import Stored
from tests.tiny_models import TinyModel, write_tiny_model

# InternLM2's names: ours. Its wqkv is split apart below.
LLAMA_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def quantised_model(
    family: str,
    stored: Stored,
    *,
    own_orders: bool = False,
    skipped: tuple[str, ...] = (),
    others: Mapping[str, Stored] | None = None,
    head: bool = False,
    **config: Any,
) -> TinyModel:
    """`own_orders`: every linear orders its inputs for itself, not by their number alone.

    `skipped`: the ends of names of linears that stay dense; `others`: of those of another format,
    the first that fits; `head`: the head is stored so too.
    """
    directory = Path(tempfile.mkdtemp(prefix=f"quantised-{family}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    model = write_tiny_model(family, directory, **config)
    tensors, rng = load_file(directory / "model.safetensors"), np.random.default_rng(0)
    names = [name for name in tensors if "layers." in name and tensors[name].dim() == 2]
    names += ["lm_head.weight"] if head else []
    for index, name in enumerate(names):
        module = name.removesuffix(".weight")
        if module.endswith(skipped):
            continue
        n, k = tensors.pop(name).shape
        found = (other for end, other in (others or {}).items() if module.endswith(end))
        form = next(found, stored)
        written = form.random(rng, n, k, index if own_orders else k)
        tensors |= {f"{module}.{suffix}": value for suffix, value in written.items()}
        weight = torch.from_numpy(np.array(form.weight(written, n, k))).float()
        set_weight(model, module, weight)
    save_file(tensors, directory / "model.safetensors")
    model.edit_config(quantization_config=dict(stored.settings))
    return model


@torch.no_grad()
def set_weight(model: TinyModel, module: str, weight: Tensor) -> None:
    """Give the transformers model the weight of a module of the checkpoint."""
    config, parameters = model.reference.config, dict(model.reference.named_parameters())
    if not module.endswith("attention.wqkv"):
        for theirs, ours in LLAMA_NAMES.items():
            module = module.replace(theirs, ours)
        parameters[f"{module}.weight"].copy_(weight)
        return
    ratio = config.num_attention_heads // config.num_key_value_heads
    rows = weight.view(config.num_key_value_heads, ratio + 2, -1, weight.shape[1])
    parts = {"q": rows[:, :ratio], "k": rows[:, ratio], "v": rows[:, ratio + 1]}
    layer = module.removesuffix("attention.wqkv")
    for name, part in parts.items():
        target = parameters[f"{layer}self_attn.{name}_proj.weight"]
        target.copy_(part.reshape(-1, weight.shape[1]))
