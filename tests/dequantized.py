"""The weights of a quantised checkpoint in numpy, from the formats' descriptions alone.

Written without the engine's readers and writers, which are held against it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_models import TinyModel

Array = NDArray[Any]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds this one of its 8 columns


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, of one file or several."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def dequantized_weights(path: Path) -> dict[str, Tensor]:
    """float32 [N, K] by module."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    stored = tensors_of(path)
    suffix = {"awq": ".qweight", "gptq": ".qweight"}.get(config["quant_method"])
    if suffix is None:
        packed = config["format"] == "pack-quantized"
        suffix = ".weight_packed" if packed else ".weight_scale"
    modules = [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]
    return {module: torch.tensor(_weight(stored, module, config)) for module in modules}


def put_into_reference(model: TinyModel, path: Path) -> Any:
    """A copy of the transformers model with the checkpoint's values."""
    reference = type(model.reference)(model.reference.config).float().eval()
    values = {
        name: tensor.float()
        for name, tensor in tensors_of(path).items()
        if name.endswith((".weight", ".bias"))
    }
    for module, weight in dequantized_weights(path).items():
        values[f"{module}.weight"] = weight
    missing, unexpected = reference.load_state_dict(values, strict=False)
    assert unexpected == []
    assert [name for name in missing if name != "lm_head.weight"] == []
    return reference


def _weight(stored: dict[str, Tensor], module: str, config: dict[str, Any]) -> Array:
    def part(name: str) -> Array:
        tensor = stored[f"{module}.{name}"]
        return (tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.float()).numpy()

    if config["quant_method"] == "awq":
        q, zeros = (_columns(part(name), AWQ_COLUMNS) for name in ("qweight", "qzeros"))
        scales = part("scales")
        size = len(q) // len(scales)
        return ((q - zeros.repeat(size, 0)) * scales.repeat(size, 0)).T
    if config["quant_method"] == "gptq":
        q = _columns(part("qweight").T, range(8)).T
        zeros = _columns(part("qzeros"), range(8))
        if config["checkpoint_format"] == "gptq":
            zeros = zeros + 1
        group = part("g_idx")
        return ((q - zeros[group]) * part("scales")[group]).T
    scales = part("weight_scale")
    if config["format"] != "pack-quantized":
        return part("weight") * scales
    rows, columns = part("weight_shape")
    q = _columns(part("weight_packed"), range(8))[:rows, :columns] - 8
    group = np.arange(columns) // (columns // scales.shape[1])
    if f"{module}.weight_g_idx" in stored:
        group = part("weight_g_idx")
    zeros = np.zeros_like(scales)
    if f"{module}.weight_zero_point" in stored:
        zeros = _columns(part("weight_zero_point").T, range(8)).T[:rows] - 8
    return (q - zeros[:, group]) * scales[:, group]


def _columns(words: Array, column_of_nibble: Any) -> Array:
    """int32 [R, C] -> [R, 8 C]."""
    found = np.zeros((*words.shape, 8), np.int64)
    for nibble, column in enumerate(column_of_nibble):
        found[:, :, column] = (words >> (4 * nibble)) & 15
    return found.reshape(len(words), -1)
