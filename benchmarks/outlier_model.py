"""A random Llama-shaped bf16 model whose statistics are like a trained one's, and its own text.

What makes 4 bits hard is in it: a few input channels of every norm are some ten times the others,
and the same ones in every layer; weights and channels are heavy-tailed; activations are
correlated, because the embeddings lie near a subspace; and the next-token distributions are
peaked. Text is sampled from the model itself, so that its perplexity is the entropy of its
distributions, and a loss of quality shows as it does on real text. Nothing is trained: there is
no language in it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.random_checkpoint import LlamaShape, model_config

OUTLIER_SHARE = 1 / 64  # of the channels
OUTLIER_GAIN = (6.0, 20.0)  # of their norm weights, against 1
CHANNEL_SPREAD = 0.4  # of the log of the other norm weights, and of rows of weights
DEGREES = 6  # of freedom of Student's t that weights are drawn from: kurtosis 6
RANK = 8  # hidden_size / RANK dimensions hold most of the embeddings
BRANCH = 0.25  # deviation of what attention or MLP adds, against 1 of the embeddings
SHARPNESS = 2.0  # of attention scores
LOGIT_STD = 4.0  # over a vocabulary of 32,000 that leaves an entropy of some 2.5 nats


def write_outlier_model(directory: Path, shape: LlamaShape, seed: int = 0) -> Path:
    """Write a checkpoint without a tokenizer; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in _tensors(shape, seed)
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model_config(shape, int4=False), indent=1))
    return directory


@torch.inference_mode()
def sample_text(model: Path, num_samples: int, num_tokens: int, seed: int = 0) -> Tensor:
    """Token ids [num_samples, num_tokens] that the model says, at temperature 1."""
    torch.manual_seed(seed)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None  # windows of one length
    reference.generation_config.pad_token_id = 0
    first = torch.randint(3, reference.config.vocab_size, (num_samples, 1))
    ids: Tensor = reference.generate(
        first, max_new_tokens=num_tokens - 1, do_sample=True, top_k=0, top_p=1.0
    )
    return ids


def _tensors(shape: LlamaShape, seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    hidden = shape.hidden_size
    outliers = torch.randperm(hidden, generator=generator)[: max(1, int(hidden * OUTLIER_SHARE))]
    yield "model.embed_tokens.weight", _embeddings(shape, generator)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        sizes = {}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = _norm(hidden, outliers, generator)
            sizes[norm] = float(weight.square().mean().sqrt())
            yield f"{prefix}{norm}.weight", weight
        for name, (rows, columns) in shape.linears().items():
            weight = _weight(rows, columns, generator) / columns**0.5
            if name.endswith(("o_proj", "down_proj")):
                weight *= BRANCH
            else:
                attends = name.startswith("self_attn")
                weight /= sizes["input_layernorm" if attends else "post_attention_layernorm"]
                weight *= SHARPNESS if name.endswith("q_proj") else 1.0
            yield f"{prefix}{name}.weight", weight
    norm_weight = _norm(hidden, outliers, generator)
    yield "model.norm.weight", norm_weight
    head = torch.randn(shape.vocab_size, hidden, generator=generator)
    yield "lm_head.weight", head * (LOGIT_STD / float(norm_weight.square().sum().sqrt()))


def _norm(hidden: int, outliers: Tensor, generator: torch.Generator) -> Tensor:
    weight: Tensor = (CHANNEL_SPREAD * torch.randn(hidden, generator=generator)).exp()
    low, high = OUTLIER_GAIN
    weight[outliers] *= low + (high - low) * torch.rand(len(outliers), generator=generator)
    return weight


def _embeddings(shape: LlamaShape, generator: torch.Generator) -> Tensor:
    """Deviation 1, most of it in a few directions."""
    rank = shape.hidden_size // RANK
    directions = torch.randn(rank, shape.hidden_size, generator=generator)
    within = torch.randn(shape.vocab_size, rank, generator=generator) @ directions
    beside = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
    table: Tensor = 0.9 * within / rank**0.5 + 0.4 * beside
    return table


def _weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Student's t of deviation 1 in the mean, rows of unlike size."""
    normal = torch.randn(rows, columns, generator=generator)
    chi_square = torch.zeros(rows, columns)
    for _ in range(DEGREES):
        chi_square += torch.randn(rows, columns, generator=generator).square()
    student = normal * (DEGREES / chi_square).sqrt() * ((DEGREES - 2) / DEGREES) ** 0.5
    spread = (CHANNEL_SPREAD * torch.randn(rows, 1, generator=generator)).exp()
    scaled: Tensor = student * spread / spread.square().mean().sqrt()
    return scaled
