"""llm-compressor, which writes compressed-tensors checkpoints.

Methods: "rtn", "awq" and "gptq", or a preset's name of its own, as "FP8_DYNAMIC".
`act_order` needs version 0.9.0, say: later ones write none that stores an order.
"""

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.quantization_config import CompressedTensorsConfig

from tools.peers.job import Job

BATCH_SIZE = 8  # samples that are computed at once; the default, 1, takes a multiple of the time
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def quantize(job: Job) -> None:
    """With the tool's own defaults but for what the job says."""
    ids = job.ids()
    if not torch.cuda.is_available():
        # It pins memory for an accelerator without asking whether there is one.
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    oneshot(
        model=model,
        processor=_any_tokenizer(),
        dataset=Dataset.from_dict(
            {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        ),
        recipe=_recipe(job),
        num_calibration_samples=ids.shape[0],
        max_seq_length=ids.shape[1],
        batch_size=BATCH_SIZE,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job.out, save_compressed=True)


def dequantize(path: Path) -> dict[str, Tensor]:
    """Through transformers, which asks compressed-tensors to decompress what it loads.

    An order of inputs is taken by the compressor itself: transformers compresses an empty model
    first, which no version that stores orders can do.
    """
    stored = load_file(path / "model.safetensors")
    ordered = [name for name in stored if name.endswith(".weight_g_idx")]
    if ordered:
        return {
            module: _dense(stored, module, path)
            for module in (name.removesuffix(".weight_g_idx") for name in ordered)
        }
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    return {
        name: module.weight.detach().float()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module, "quantization_scheme")
    }


def _dense(stored: dict[str, Tensor], module: str, path: Path) -> Tensor:
    """float32 [N, K] of a linear whose order of inputs is stored."""
    from compressed_tensors.compressors import PackedQuantizationCompressor  # of before 0.14

    config = json.loads((path / "config.json").read_text())["quantization_config"]
    arguments = QuantizationConfig.model_validate(config).config_groups["group_0"].weights
    parts = {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in stored.items()
        if name.startswith(f"{module}.")
    }
    parts["weight_scale"] = parts["weight_scale"].float()
    compressor = PackedQuantizationCompressor()
    dense: Tensor = compressor.decompress_weight(parts, quantization_args=arguments)
    return dense.float()


def _recipe(job: Job) -> list[Any]:
    common: dict[str, Any] = {"ignore": ["lm_head"]}
    if job.method.isupper():
        return [QuantizationModifier(targets="Linear", scheme=job.method, **common)]
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "channel" if job.group_size == -1 else "group",
        "group_size": None if job.group_size == -1 else job.group_size,
    }
    common["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if job.method == "gptq":
        order = "group" if job.act_order else "static"
        return [GPTQModifier(actorder=order, **common)]
    if job.method == "rtn":
        return [QuantizationModifier(**common)]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # of 0.10 and later

    return [AWQModifier(), QuantizationModifier(**common)]


def _any_tokenizer() -> PreTrainedTokenizerFast:
    """It asks for one, even for samples of token ids."""
    words = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="")
