"""Every stored format, read whole and in parts, is what its layout says; and written, alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.models.hf_config import HFConfig
from engine.models.layout import HARMLESS
from engine.models.quantization import read_quantization
from engine.weights.checkpoint import Checkpoint
from engine.weights.formats.awq import awq_config, encode_awq
from engine.weights.formats.compressed_tensors import (
    Kind,
    compressed_tensors_config,
    encode_pack_quantized,
    encode_w8,
)
from engine.weights.formats.gptq import Version, encode_gptq, gptq_config
from engine.weights.formats.groups import STEP
from engine.weights.formats.words import pack_columns, pack_rows, unpack_columns, unpack_rows
from engine.weights.matrix import Int4Matrix, W8Matrix
from engine.weights.stored import Piece, StoredLinear, read_dense, read_weight, to_dense
from tests.stored_formats import (
    ACT_ORDER,
    FORMATS,
    Array,
    Stored,
    Tensors,
    awq_gemm,
    gptq,
    packed,
    scaled,
)

MODULE = "model.layers.0.mlp.up_proj"
N, K = 48, 192
INT4 = [
    name for name in FORMATS if name.startswith(("awq", "gptq", "packed")) and "8 bits" not in name
]


def linear_of(path: Path, config: dict[str, object], n: int = N, k: int = K) -> StoredLinear:
    quantization = read_quantization(path, HFConfig({"quantization_config": config}, "config.json"))
    assert quantization is not None
    return StoredLinear(MODULE, n, k, bias=False, format=quantization.format_of(MODULE))


def write(path: Path, tensors: Tensors) -> None:
    save_file(
        {f"{MODULE}.{suffix}": value.contiguous() for suffix, value in tensors.items()},
        path / "model.safetensors",
    )


def write_random(path: Path, stored: Stored, n: int = N, k: int = K) -> tuple[StoredLinear, Array]:
    tensors = stored.random(np.random.default_rng(0), n, k, 7)
    write(path, tensors)
    return linear_of(path, dict(stored.settings), n, k), stored.weight(tensors, n, k)


def verified(path: Path, linear: StoredLinear) -> Tensor:
    """The whole linear, after the comparison of names and shapes that the loader makes."""
    with Checkpoint(path) as checkpoint:
        checkpoint.verify(linear.tensors(), HARMLESS, linear.optional())
        return read_dense(checkpoint, linear)


def assert_equal(found: Tensor, expected: Array) -> None:
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_linear(name: str, tmp_path: Path) -> None:
    linear, expected = write_random(tmp_path, FORMATS[name])
    found = verified(tmp_path, linear)
    assert found.dtype == torch.float32
    assert_equal(found, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_any_part(name: str, tmp_path: Path) -> None:
    """Outputs and inputs from anywhere to anywhere, within words, groups and blocks."""
    linear, expected = write_random(tmp_path, FORMATS[name])
    rng = np.random.default_rng(1)
    cuts = [
        (slice(0, N), slice(96, K)),
        (slice(12, 24), slice(0, 96)),
        (slice(0, N), slice(64, 80)),
    ]
    for _ in range(8):
        (a, b), (c, d) = sorted(rng.choice(N + 1, 2, False)), sorted(rng.choice(K + 1, 2, False))
        cuts.append((slice(int(a), int(b)), slice(int(c), int(d))))
    with Checkpoint(tmp_path) as checkpoint:
        for rows, inputs in cuts:
            piece = Piece(linear, rows.start, rows.stop)
            found = to_dense(read_weight(checkpoint, [piece], inputs, torch.float32))
            assert_equal(found, expected[rows, inputs])


@pytest.mark.parametrize("name", INT4)
def test_int4_stays_int4_whatever_the_cut(name: str, tmp_path: Path) -> None:
    """In groups that the kernels take, also where a rank's inputs end within one."""
    linear, _ = write_random(tmp_path, FORMATS[name])
    with Checkpoint(tmp_path) as checkpoint:
        for inputs in (slice(0, K), slice(0, 96), slice(96, K), slice(144, K), slice(48, 96)):
            piece = Piece(linear, 0, N)
            found = read_weight(checkpoint, [piece], inputs, torch.float32)
            assert isinstance(found, Int4Matrix)
            assert found.group_size % STEP == 0 or len(found.scales) == 1
            shape = linear.format.int4_shape(piece.part(inputs))
            assert shape is not None
            if name in ACT_ORDER and len(found.q) > inputs.stop - inputs.start:
                assert shape[1] == found.group_size == STEP
                assert abs(shape[0] - len(found.q)) <= len(found.q) / 2
            else:
                assert shape == (len(found.q), found.group_size)


@pytest.mark.parametrize("name", ["int8 channel", "packed 8 bits, channel", "llm.int8"])
def test_symmetric_int8_keeps_its_values(name: str, tmp_path: Path) -> None:
    linear, _ = write_random(tmp_path, FORMATS[name])
    pieces = [Piece(linear, 0, 10), Piece(linear, 30, N)]
    with Checkpoint(tmp_path) as checkpoint:
        found = read_weight(checkpoint, pieces, slice(3, K), torch.bfloat16)
    assert isinstance(found, W8Matrix)
    assert found.q.dtype == torch.int8
    assert found.shape == (N - 20, K - 3)


def test_inputs_that_do_not_fill_the_last_group_or_word(tmp_path: Path) -> None:
    """GPTQ rounds the number of groups up; compressed-tensors the number of words too."""
    for stored, k in ((gptq(64), 80), (packed(64, symmetric=False), 83), (packed(-1), 83)):
        linear, expected = write_random(tmp_path, stored, n=40, k=k)
        assert_equal(verified(tmp_path, linear), expected)


def test_an_order_that_was_never_filled_in(tmp_path: Path) -> None:
    stored = packed(32)
    tensors = stored.random(np.random.default_rng(0), N, K, 0)
    write(tmp_path, tensors | {"weight_g_idx": torch.full((K,), -1, dtype=torch.int32)})
    found = verified(tmp_path, linear_of(tmp_path, dict(stored.settings)))
    assert_equal(found, stored.weight(tensors, N, K))


# -- writing -----------------------------------------------------------------------------------


def random_matrix(act_order: bool, symmetric: bool, group_size: int = 32) -> Int4Matrix:
    rng = torch.Generator().manual_seed(0)
    groups = K // group_size
    zeros = torch.randint(0, 16, (groups, N), dtype=torch.uint8, generator=rng)
    return Int4Matrix(
        q=torch.randint(0, 16, (K, N), dtype=torch.uint8, generator=rng),
        zeros=torch.full_like(zeros, 8) if symmetric else zeros,
        scales=torch.rand(groups, N, generator=rng).half(),
        input_order=torch.randperm(K, generator=rng) if act_order else None,
    )


def assert_round_trip(
    path: Path, tensors: Tensors, config: dict[str, object], stored: Stored, expected: Tensor
) -> None:
    """What was written means `expected`, to NumPy and to the reader of these settings."""
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_equal(expected, stored.weight(tensors, N, K))
    write(path, tensors)
    assert torch.equal(verified(path, linear_of(path, config)), expected)


@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_awq_that_was_written(group_size: int, tmp_path: Path) -> None:
    matrix = random_matrix(False, False, K if group_size == -1 else group_size)
    config = awq_config(group_size, symmetric=False, skipped=["down_proj"])
    assert config["modules_to_not_convert"] == ["down_proj"]
    expected = matrix.dequantize()
    assert_round_trip(tmp_path, encode_awq(matrix), config, awq_gemm(group_size), expected)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_that_was_written(
    version: Version, act_order: bool, symmetric: bool, tmp_path: Path
) -> None:
    matrix = random_matrix(act_order, symmetric)
    tensors = encode_gptq(matrix, version)
    assert not symmetric or {hex(w & 0xFFFFFFFF) for w in tensors["qzeros"].flatten().tolist()} == {
        "0x77777777" if version == "gptq" else "0x88888888"
    }
    config = gptq_config(32, symmetric, act_order, [], version)
    stored = gptq(32, version=1 if version == "gptq" else 2, act_order=act_order)
    assert_round_trip(tmp_path, tensors, config, stored, matrix.dequantize())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_packed_that_was_written(
    act_order: bool, symmetric: bool, group_size: int, tmp_path: Path
) -> None:
    if group_size == -1 and act_order:
        pytest.skip("one group has no order")
    matrix = random_matrix(act_order, symmetric, K if group_size == -1 else group_size)
    tensors = encode_pack_quantized(matrix, symmetric)
    config = compressed_tensors_config("int4", group_size, symmetric, act_order, [])
    stored = packed(group_size, symmetric=symmetric, act_order=act_order)
    assert_round_trip(tmp_path, tensors, config, stored, matrix.dequantize())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_w8_that_was_written(kind: Kind, tmp_path: Path) -> None:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 40
    q = values.to(torch.int8) if kind == "int8" else values.to(torch.float8_e4m3fn)
    matrix = W8Matrix(q, torch.rand(N) + 0.1)
    config = compressed_tensors_config(kind, None, True, False, [])
    stored = scaled("int" if kind == "int8" else "float", "channel")
    assert_round_trip(tmp_path, encode_w8(matrix), config, stored, matrix.dequantize())


@pytest.mark.parametrize(
    "config",
    [
        awq_config(32, False, ["mlp.up_proj"]),
        gptq_config(32, True, False, [MODULE]),
        compressed_tensors_config("int4", 32, True, False, [MODULE]),
    ],
)
def test_skipped_modules_are_dense(config: dict[str, object], tmp_path: Path) -> None:
    assert linear_of(tmp_path, config).tensors().keys() == {f"{MODULE}.weight"}


def test_what_a_format_cannot_say_is_not_written() -> None:
    ordered = random_matrix(True, False)
    with pytest.raises(ValueError, match="no order of inputs"):
        encode_awq(ordered)
    with pytest.raises(ValueError, match="the zero 8 everywhere"):
        encode_pack_quantized(ordered, symmetric=True)
    assert ordered.input_order is not None
    ordered.input_order[0] = ordered.input_order[1]
    for encode in (encode_gptq, lambda m: encode_pack_quantized(m, symmetric=False)):
        with pytest.raises(ValueError, match="a rank's cut"):
            encode(ordered)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([2, 4, 8]), st.integers(0, 2**32 - 1))
def test_words_give_back_what_was_packed(rows: int, columns: int, bits: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=rng)
    words = pack_rows(values, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack_rows(words, bits)[:, :columns], values)
    assert torch.equal(pack_columns(values.t(), bits).t(), words)
    assert torch.equal(unpack_columns(words.t().contiguous(), bits)[:columns].t(), values)


# -- damage ------------------------------------------------------------------------------------


def refusal(path: Path, stored: Stored, tensors: Tensors) -> str:
    write(path, tensors)
    linear = linear_of(path, dict(stored.settings))
    with pytest.raises(CheckpointError) as caught:
        verified(path, linear)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_must_be_finite(name: str, value: float, tmp_path: Path) -> None:
    stored = FORMATS[name]
    tensors = stored.random(np.random.default_rng(0), N, K, 7)
    suffixes = ("scales", "weight_scale", "weight_scale_inv", "SCB", "nested_absmax", "absmax")
    suffix = next(s for s in tensors if s.endswith(suffixes) and tensors[s].is_floating_point())
    tensors[suffix].view(-1)[0] = value
    message = refusal(tmp_path, stored, tensors)
    assert f"the tensor {MODULE}.{suffix} holds 1 values that are NaN or infinite" in message


def test_fp8_weights_must_be_finite(tmp_path: Path) -> None:
    tensors = FORMATS["fp8 block"].random(np.random.default_rng(0), N, K, 7)
    tensors["weight"].view(torch.uint8)[3, 4] = 0x7F
    message = refusal(tmp_path, FORMATS["fp8 block"], tensors)
    assert f"the tensor {MODULE}.weight holds 1 values" in message


@pytest.mark.parametrize("group", [-1, 6])
@pytest.mark.parametrize("name", ["gptq act-order", "packed act-order"])
def test_a_group_that_there_is_not(group: int, name: str, tmp_path: Path) -> None:
    tensors = FORMATS[name].random(np.random.default_rng(0), N, K, 7)
    suffix = "g_idx" if name.startswith("gptq") else "weight_g_idx"
    tensors[suffix][5] = group
    message = refusal(tmp_path, FORMATS[name], tensors)
    assert f"{MODULE}.{suffix} names group {group}, but there are groups 0 to 5" in message


@pytest.mark.parametrize("stored", [awq_gemm(96), gptq(96), packed(96)])
def test_another_group_size(stored: Stored, tmp_path: Path) -> None:
    tensors = stored.random(np.random.default_rng(0), N, K, 7)
    write(tmp_path, tensors)
    settings = json.loads(json.dumps(dict(stored.settings)).replace("96", "64"))
    linear = linear_of(tmp_path, settings)
    with pytest.raises(CheckpointError) as caught:
        verified(tmp_path, linear)
    assert "its groups follow from group_size 64 of the quantization settings" in str(caught.value)


def test_zero_points_of_symmetric_int8(tmp_path: Path) -> None:
    """Older tools wrote them, all 0; others contradict the settings."""
    stored = FORMATS["int8 channel"]
    tensors = stored.random(np.random.default_rng(0), N, K, 7)
    zeros = torch.zeros(N, 1, dtype=torch.int8)
    write(tmp_path, tensors | {"weight_zero_point": zeros})
    linear = linear_of(tmp_path, dict(stored.settings))
    assert_equal(verified(tmp_path, linear), stored.weight(tensors, N, K))
    zeros[3] = 1
    assert "say symmetric" in refusal(tmp_path, stored, tensors | {"weight_zero_point": zeros})


def test_bitsandbytes_of_another_kind(tmp_path: Path) -> None:
    stored = FORMATS["nf4"]
    tensors = stored.random(np.random.default_rng(0), N, K, 7)
    state = "weight.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[state].tolist())
    other = torch.tensor(list(text.replace(b"64", b"32")), dtype=torch.uint8)
    assert "supported is {'blocksize': 64" in refusal(tmp_path, stored, tensors | {state: other})
    broken = tensors[state][:-1]
    message = refusal(tmp_path, stored, tensors | {state: broken})
    assert "is no description of a weight" in message
    stored = FORMATS["llm.int8"]
    tensors = stored.random(np.random.default_rng(0), N, K, 7)
    order = {"weight_format": torch.tensor(1, dtype=torch.uint8)}
    assert "in an order of one kind of GPU" in refusal(tmp_path, stored, tensors | order)


@pytest.mark.parametrize(
    ("stored", "n", "k", "message"),
    [
        (awq_gemm(32), 100, 64, "100 outputs are not a multiple of 8"),
        (awq_gemm(48), 64, 64, "64 inputs are not a multiple of AWQ's group_size 48"),
        (FORMATS["awq gemv 64"], 64, 96, "96 inputs are not a multiple of AWQ's group_size 64"),
        (gptq(32), 64, 60, "60 inputs are not a multiple of 8"),
        (gptq(32, bits=2), 40, 64, "40 outputs are not a multiple of 16"),
    ],
)
def test_sizes_that_do_not_fill_words(
    stored: Stored, n: int, k: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"{MODULE}: {message}"):
        linear_of(tmp_path, dict(stored.settings), n, k)
