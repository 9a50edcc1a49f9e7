"""Random linears in every stored format, and what they mean by the layouts' description.

The oracle of the readers' tests, in NumPy: nothing here is the engine's. Values are unpacked one
bit field after another, weights computed in float64.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = dict[str, Tensor]
Array = NDArray[Any]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the nibbles of a word, by column


@dataclass(frozen=True)
class Stored:
    """One format: its settings, random tensors of a linear, and the weight [N, K] they stand for.

    `order` seeds the order of inputs, so that linears can share one.
    """

    settings: Mapping[str, Any]
    random: Callable[[np.random.Generator, int, int, int], Tensors]  # generator, N, K, order
    weight: Callable[[Mapping[str, Tensor], int, int], Array]  # tensors, N, K -> float64


def fields(words: Array, bits: int) -> Array:
    """int32 [..., W] -> [..., W, 32 / bits], value i of a word from bit `bits * i` on."""
    wide = words.astype(np.int64) & 0xFFFFFFFF
    return np.stack([wide >> at & (1 << bits) - 1 for at in range(0, 32, bits)], axis=-1)


def in_order(words: Array, bits: int) -> Array:
    """int32 [R, W] -> [R, values]."""
    return fields(words, bits).reshape(len(words), -1)


def awq_order(words: Array) -> Array:
    return fields(words, 4)[..., list(AWQ_ORDER)].reshape(len(words), -1)


def random_words(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.integers(-(2**31), 2**31, shape).astype(np.int32))


def random_scales(rng: np.random.Generator, *shape: int, size: float = 0.05) -> Tensor:
    """fp16, all of about one size, so that no output dwarfs the others."""
    return torch.from_numpy(rng.uniform(0.5, 1.5, shape) * size).half()


def random_groups(seed: int, num_inputs: int, group_size: int) -> Tensor:
    """int32 [K]: the group of each input, after act-order."""
    groups = np.arange(num_inputs) // group_size
    return torch.from_numpy(np.random.default_rng(seed).permutation(groups).astype(np.int32))


def by_groups(q: Array, zeros: Array, scales: Array, group_of: Array) -> Array:
    """q [K, N], zeros and scales [G, N] -> [N, K]."""
    return ((q - zeros[group_of]) * scales.astype(np.float64)[group_of]).T


# -- AWQ ---------------------------------------------------------------------------------------


def awq_gemm(group_size: int) -> Stored:
    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        groups = 1 if group_size == -1 else k // group_size
        return {
            "qweight": random_words(rng, k, n // 8),
            "qzeros": random_words(rng, groups, n // 8),
            "scales": random_scales(rng, groups, n),
        }

    def weight(tensors: Mapping[str, Tensor], n: int, k: int) -> Array:
        size = k if group_size == -1 else group_size
        return by_groups(
            awq_order(tensors["qweight"].numpy()),
            awq_order(tensors["qzeros"].numpy()),
            tensors["scales"].numpy(),
            np.arange(k) // size,
        )

    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": group_size, "zero_point": True}
    return Stored(settings, random, weight)


def awq_gemv(group_size: int) -> Stored:
    multiple = {32: 4, 64: 2, 128: 1}[group_size]

    def zero_words(k: int) -> int:
        words = -(-(k // group_size) // 8)
        return -(-words // multiple) * multiple

    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        return {
            "qweight": random_words(rng, n, k // 8),
            "qzeros": random_words(rng, n, zero_words(k)),
            "scales": random_scales(rng, n, 8 * zero_words(k)),
        }

    def weight(tensors: Mapping[str, Tensor], n: int, k: int) -> Array:
        return by_groups(
            in_order(tensors["qweight"].numpy(), 4).T,
            in_order(tensors["qzeros"].numpy(), 4).T,
            tensors["scales"].numpy().T,
            np.arange(k) // group_size,
        )

    settings = {"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": group_size}
    return Stored(settings, random, weight)


# -- GPTQ --------------------------------------------------------------------------------------


def gptq(
    group_size: int,
    bits: int = 4,
    version: int = 1,
    act_order: bool = False,
    symmetric: bool = False,
) -> Stored:
    per_word = 32 // bits

    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        size = k if group_size == -1 else group_size
        groups = -(-k // size)
        zeros = random_words(rng, groups, n // per_word)
        if symmetric:
            middle = (1 << (bits - 1)) - (version == 1)
            word = sum(middle << at for at in range(0, 32, bits))
            zeros = torch.from_numpy(np.full(zeros.shape, word, np.uint32).view(np.int32))
        in_place = torch.arange(k, dtype=torch.int32) // size
        return {
            "qweight": random_words(rng, k // per_word, n),
            "qzeros": zeros,
            "scales": random_scales(rng, groups, n, size=0.7 / (1 << bits)),
            "g_idx": random_groups(order, k, size) if act_order else in_place,
        }

    def weight(tensors: Mapping[str, Tensor], n: int, k: int) -> Array:
        zeros = in_order(tensors["qzeros"].numpy(), bits)
        if version == 1:
            zeros = (zeros + 1) & ((1 << bits) - 1)
        q = in_order(tensors["qweight"].numpy().T, bits).T
        return by_groups(q, zeros, tensors["scales"].numpy(), tensors["g_idx"].numpy())

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Stored(settings, random, weight)


# -- compressed-tensors ------------------------------------------------------------------------


def compressed_tensors(form: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with one group for every linear of the layers."""
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "output"],
    }


def packed(
    group_size: int, bits: int = 4, symmetric: bool = True, act_order: bool = False
) -> Stored:
    per_word = 32 // bits

    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        size = k if group_size == -1 else group_size
        groups = -(-k // size)
        tensors = {
            "weight_packed": random_words(rng, n, -(-k // per_word)),
            "weight_scale": random_scales(rng, n, groups, size=0.7 / (1 << bits)).bfloat16(),
            "weight_shape": torch.tensor([n, k]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = random_words(rng, -(-n // per_word), groups)
        if act_order:
            tensors["weight_g_idx"] = random_groups(order, k, size)
        return tensors

    def weight(tensors: Mapping[str, Tensor], n: int, k: int) -> Array:
        size, middle = k if group_size == -1 else group_size, 1 << (bits - 1)
        q = in_order(tensors["weight_packed"].numpy(), bits)[:, :k] - middle
        scales = tensors["weight_scale"].float().numpy()
        zeros = np.zeros(scales.shape)
        if not symmetric:
            zeros = in_order(tensors["weight_zero_point"].numpy().T, bits)[:, :n].T - middle
        group_of = np.arange(k) // size
        if act_order:
            group_of = tensors["weight_g_idx"].numpy()
        return by_groups(q.T, zeros.T, scales.T, group_of)

    scheme = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": "group" if act_order else None,
    }
    return Stored(compressed_tensors("pack-quantized", scheme), random, weight)


def e4m3(data: Array) -> Array:
    """fp8 e4m3 bytes -> float64: sign, 4 bits of exponent biased by 7, 3 of fraction."""
    sign, exponent, fraction = data >> 7, data >> 3 & 15, data & 7
    small = fraction / 8 * 2.0**-6
    large = (1 + fraction / 8) * 2.0 ** (exponent.astype(np.float64) - 7)
    return np.where(sign == 1, -1.0, 1.0) * np.where(exponent == 0, small, large)


def random_e4m3(rng: np.random.Generator, n: int, k: int) -> Tensor:
    """Every pattern but NaN's, 0x7f and 0xff."""
    data = rng.integers(0, 255, (n, k)).astype(np.uint8)
    data[data == 0x7F] = 0x7E
    return torch.from_numpy(data).view(torch.float8_e4m3fn)


def scaled(
    kind: str, strategy: str, symmetric: bool = True, block: tuple[int, int] = (1, 1)
) -> Stored:
    """int-quantized or float-quantized."""

    def shape(n: int, k: int) -> tuple[int, ...]:
        blocks = -(-n // block[0]), -(-k // block[1])
        return {"channel": (n, 1), "tensor": (1,), "block": blocks}[strategy]

    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        if kind == "float":
            values, size = random_e4m3(rng, n, k), 0.002
        else:
            values = torch.from_numpy(rng.integers(-128, 128, (n, k)).astype(np.int8))
            size = 0.003
        tensors = {"weight": values}
        tensors["weight_scale"] = random_scales(rng, *shape(n, k), size=size).bfloat16()
        if not symmetric:
            zeros = rng.integers(-128, 128, shape(n, k)).astype(np.int8)
            tensors["weight_zero_point"] = torch.from_numpy(zeros)
        return tensors

    def weight(tensors: Mapping[str, Tensor], n: int, k: int) -> Array:
        values = tensors["weight"]
        q = e4m3(values.view(torch.uint8).numpy()) if kind == "float" else values.double().numpy()
        scales, zeros = tensors["weight_scale"].double().numpy(), np.zeros((1, 1))
        if not symmetric:
            zeros = tensors["weight_zero_point"].double().numpy()
        if strategy == "block":
            scales = np.kron(scales, np.ones(block))[:n, :k]
        return np.asarray((q - zeros) * scales)

    scheme = {"num_bits": 8, "type": kind, "symmetric": symmetric, "strategy": strategy}
    if strategy == "block":
        scheme["block_structure"] = list(block)
    return Stored(compressed_tensors(f"{kind}-quantized", scheme), random, weight)


def fp8_block(block: tuple[int, int]) -> Stored:
    """DeepSeek-V3's: the same under another name, with fp32 scales."""
    inner = scaled("float", "block", block=block)

    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        tensors = inner.random(rng, n, k, order)
        tensors["weight_scale_inv"] = tensors.pop("weight_scale").float()
        return tensors

    def weight(tensors: Mapping[str, Tensor], n: int, k: int) -> Array:
        return inner.weight({**tensors, "weight_scale": tensors["weight_scale_inv"]}, n, k)

    settings = {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"}
    return Stored(settings, random, weight)


def fp8_tensor() -> Stored:
    """AutoFP8's, the scale without a dimension."""
    inner = scaled("float", "tensor")

    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        tensors = inner.random(rng, n, k, order)
        scalars = {"weight_scale": tensors["weight_scale"].reshape(()).float()}
        return tensors | scalars | {"input_scale": torch.tensor(1.0)}

    return Stored({"quant_method": "fp8", "activation_scheme": "static"}, random, inner.weight)


# -- bitsandbytes ------------------------------------------------------------------------------


def bnb_4bit(kind: str, double: bool) -> Stored:
    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        blocks = -(-n * k // 64)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": [n, k],
        }
        tensors = {
            "weight": torch.from_numpy(rng.integers(0, 256, (-(-n * k // 2), 1)).astype(np.uint8)),
            "weight.quant_map": torch.from_numpy(rng.uniform(-1, 1, 16).astype(np.float32)),
            "weight.absmax": random_scales(rng, blocks, size=0.4).float(),
        }
        if double:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            nested = -(-blocks // 256)
            codes = rng.integers(0, 256, blocks).astype(np.uint8)
            tensors["weight.absmax"] = torch.from_numpy(codes)
            tensors["weight.nested_absmax"] = random_scales(rng, nested, size=0.2).float()
            values = rng.uniform(-1, 1, 256).astype(np.float32)
            tensors["weight.nested_quant_map"] = torch.from_numpy(values)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        return tensors | {f"weight.quant_state.bitsandbytes__{kind}": torch.from_numpy(text)}

    def weight(tensors: Mapping[str, Tensor], n: int, k: int) -> Array:
        data = tensors["weight"].numpy()[:, 0]
        codes = np.empty(2 * len(data), np.int64)
        codes[0::2], codes[1::2] = data >> 4, data & 15
        absmax = tensors["weight.absmax"].numpy()
        if double:
            nested = tensors["weight.nested_absmax"].double().numpy()
            levels = tensors["weight.nested_quant_map"].double().numpy()[absmax]
            absmax = levels * np.repeat(nested, 256)[: len(absmax)] + 0.25
        values = tensors["weight.quant_map"].double().numpy()[codes]
        return np.asarray(values[: n * k] * np.repeat(absmax, 64)[: n * k]).reshape(n, k)

    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_skip_modules": None,
    }
    return Stored(settings, random, weight)


def bnb_int8() -> Stored:
    def random(rng: np.random.Generator, n: int, k: int, order: int) -> Tensors:
        return {
            "weight": torch.from_numpy(rng.integers(-127, 128, (n, k)).astype(np.int8)),
            "SCB": random_scales(rng, n, size=0.4).float(),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    def weight(tensors: Mapping[str, Tensor], n: int, k: int) -> Array:
        scales = tensors["SCB"].double().numpy() / 127
        return tensors["weight"].double().numpy() * scales[:, None]

    settings = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_skip_modules": ["lm_head", "output"],
    }
    return Stored(settings, random, weight)


FORMATS: dict[str, Stored] = {
    "awq gemm": awq_gemm(32),
    "awq gemm, one group": awq_gemm(-1),
    "awq gemv 32": awq_gemv(32),
    "awq gemv 64": awq_gemv(64),
    "gptq v1": gptq(32),
    "gptq v1 symmetric": gptq(32, symmetric=True),
    "gptq v2": gptq(32, version=2),
    "gptq v2 symmetric": gptq(64, version=2, symmetric=True),
    "gptq act-order": gptq(32, act_order=True),
    "gptq v2 act-order": gptq(64, version=2, act_order=True, symmetric=True),
    "gptq one group": gptq(-1),
    "gptq one group, act-order": gptq(-1, act_order=True),
    "gptq 2 bits": gptq(32, bits=2),
    "gptq 8 bits": gptq(32, bits=8, act_order=True),
    "gptq 8 bits, one group": gptq(-1, bits=8, symmetric=True),
    "packed": packed(32),
    "packed asymmetric": packed(32, symmetric=False),
    "packed channel": packed(-1),
    "packed asymmetric channel": packed(-1, symmetric=False),
    "packed act-order": packed(32, act_order=True),
    "packed asymmetric act-order": packed(64, symmetric=False, act_order=True),
    "packed 8 bits": packed(32, bits=8, symmetric=False),
    "packed 8 bits, channel": packed(-1, bits=8),
    "int8 channel": scaled("int", "channel"),
    "int8 channel asymmetric": scaled("int", "channel", symmetric=False),
    "int8 tensor": scaled("int", "tensor"),
    "fp8 channel": scaled("float", "channel"),
    "fp8 tensor": scaled("float", "tensor"),
    "fp8 block of compressed-tensors": scaled("float", "block", block=(16, 32)),
    "fp8 block": fp8_block((32, 48)),
    "fp8 of AutoFP8": fp8_tensor(),
    "nf4": bnb_4bit("nf4", double=False),
    "nf4 double": bnb_4bit("nf4", double=True),
    "fp4": bnb_4bit("fp4", double=False),
    "llm.int8": bnb_int8(),
}
ACT_ORDER = tuple(name for name, stored in FORMATS.items() if "act-order" in name)
