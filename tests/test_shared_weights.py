"""A decoder over the node's shared files equals one that read its checkpoint, bit by bit."""

import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.models import Decoder, load_decoder, load_spec
from engine.models import loader as loader_module
from engine.parallel import ParallelGroup
from engine.weights.cache import WeightCache
from engine.worker import Worker
from kernels.cpu.int4 import pack_amx_int4
from kernels.opaque import is_opaque, opaque_bytes
from kernels.stored_weight import PACKING_VERSION
from tests.paged_decoding import PagedDecoder, Replay, replay_rank
from tests.test_families import PROMPT
from tests.test_tensor_parallel import free_port
from tests.tiny_models import FAMILIES, TinyModel, copy_model, tiny_model

GROUP_SIZE = 32  # the smallest that the compiled kernel multiplies
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
OUTPUT = [5, 6, 7]
DTYPES = (torch.float32, torch.bfloat16)


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor within a decoder; an opaque one as its bytes."""
    if isinstance(value, Tensor):
        if is_opaque(value):
            memory, descriptor = opaque_bytes(value)
            yield name, memory
            yield f"{name} layout", descriptor
        else:
            yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, tuple):
        for index, each in enumerate(value):
            yield from tensors(each, f"{name}[{index}]")


def assert_same_decoder(found: object, expected: object) -> None:
    ours, theirs = dict(tensors(found)), dict(tensors(expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].is_contiguous() == tensor.is_contiguous(), name
        assert torch.equal(ours[name], tensor), name


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "cache", 1 << 30)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a warm node reads no checkpoint")

    monkeypatch.setattr(loader_module, "Checkpoint", refuse)


@pytest.mark.parametrize("group_size", [None, GROUP_SIZE])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(
    family: str, group_size: int | None, cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(family, group_size, **SIZES).path
    for dtype in DTYPES:
        check_computation(path, dtype, False, cache, monkeypatch)


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("group_size", [None, 16, GROUP_SIZE])  # 16: no 4-bit kernel takes it
def test_every_packing(
    group_size: int | None,
    int8_activations: bool,
    kernels: None,
    cache: WeightCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny_model("llama", group_size, **SIZES).path
    check_computation(path, torch.bfloat16, int8_activations, cache, monkeypatch)


def check_computation(
    path: Path,
    dtype: torch.dtype,
    int8_activations: bool,
    cache: WeightCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine that makes the file, and one that finds it, compute what one without does."""
    plain = PagedDecoder(path, dtype, int8_activations=int8_activations)
    expected = plain.replay(PROMPT, OUTPUT)
    assert expected is not None
    for warm in (False, True):
        with monkeypatch.context() as patch:
            if warm:
                forbid(patch)
            mapped = PagedDecoder(path, dtype, int8_activations=int8_activations, cache=cache)
        assert_same_decoder(mapped.decoder, plain.decoder)
        found = mapped.replay(PROMPT, OUTPUT)
        assert found is not None
        assert torch.equal(found, expected)


@pytest.mark.parametrize("group_size", [None, GROUP_SIZE])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank(family: str, group_size: int | None, cache: WeightCache) -> None:
    path = tiny_model(family, group_size, **SIZES).path
    for dtype in DTYPES:
        for rank in range(2):
            plain = load_rank(path, dtype, rank, None)
            assert_same_decoder(load_rank(path, dtype, rank, cache), plain)
            assert_same_decoder(load_rank(path, dtype, rank, cache), plain)


def load_rank(path: Path, dtype: torch.dtype, rank: int, cache: WeightCache | None) -> Decoder:
    """One of two ranks; loading needs no peer."""
    group = ParallelGroup(rank, 2)
    return load_decoder(path, load_spec(path), dtype=dtype, device="cpu", group=group, cache=cache)


def test_two_ranks_compute_the_same(tmp_path: Path) -> None:
    jobs = [
        Replay(tiny_model("llama", group_size, **SIZES).path, dtype, PROMPT, OUTPUT, cache)
        for group_size in (None, GROUP_SIZE)
        for dtype in DTYPES
        for cache in (None, tmp_path / "cache", tmp_path / "cache")
    ]
    out = tmp_path / "logits.pt"
    spawn(replay_rank, (f"127.0.0.1:{free_port()}", out, jobs), nprocs=2)  # type: ignore[no-untyped-call]
    results = torch.load(out)
    for plain, cold, warm in zip(results[::3], results[1::3], results[2::3], strict=True):
        assert torch.equal(cold, plain)
        assert torch.equal(warm, plain)
    assert len(list((tmp_path / "cache").glob("*.rank?-of-2.safetensors"))) == 8


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_stored_once(tied: bool, cache: WeightCache) -> None:
    path = tiny_model("llama", tie_word_embeddings=tied).path
    decoder = PagedDecoder(path, cache=cache).decoder
    assert decoder.head is not None
    assert decoder.embed is not None
    weight: Any = decoder.head.linear.weight
    assert (weight.data.data_ptr() == decoder.embed.weight.data_ptr()) == tied


def load_once(model: TinyModel, cache: WeightCache) -> int:
    """Load in float32; returns how many files the cache holds then."""
    PagedDecoder(model.path, cache=cache)
    return len(list(cache.directory.glob("*.safetensors")))


def test_a_changed_checkpoint_is_packed_anew(cache: WeightCache, tmp_path: Path) -> None:
    model = copy_model(tiny_model("llama"), tmp_path / "model")
    assert load_once(model, cache) == 1
    assert load_once(model, cache) == 1
    time.sleep(0.02)  # a file's times move in steps of a few milliseconds
    other = tiny_model("llama", max_position_embeddings=64)  # same sizes and header
    shutil.copyfile(other.path / "model.safetensors", model.path / "model.safetensors")
    assert load_once(model, cache) == 2
    model.edit_config(rms_norm_eps=1e-3)
    assert load_once(model, cache) == 3
    model.edit_config(bos_token_id=5)  # nothing the decoder is made of
    assert load_once(model, cache) == 3


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = itertools.count()
    monkeypatch.setattr(loader_module, "weights_fingerprint", lambda _: [["model", next(sizes), 0]])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        PagedDecoder(tiny_model("llama").path, cache=cache)
    assert list(cache.directory.glob("*.safetensors")) == []


@pytest.mark.parametrize("setting", ["a directory", None])
def test_the_worker_follows_its_config(setting: str | None, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    config = EngineConfig(
        model=str(tiny_model("llama").path),
        dtype="float32",
        device="cpu",
        cache_max_entry_count=8,
        session_len=64,
        weights_cache=str(directory) if setting else None,
    )
    Worker(config, ParallelGroup())
    assert directory.exists() == (setting is not None)


def test_auto_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model="m")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert config.weights_cache_directory() == Path("/somewhere/manta")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert config.weights_cache_directory() == Path.home() / ".cache" / "manta"


def test_the_packing_version_names_this_layout() -> None:
    """When this fails on purpose, raise PACKING_VERSION: files of the old layout lie about."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (64, 32), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (2, 32), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 9, (2, 32), generator=generator) / 8
    digest = sha256()
    for int8 in (False, True):
        weight = pack_amx_int4(q, zeros, scales, int8)
        for part in (weight.packed, weight.scales, weight.zeros):
            digest.update(part.numpy().tobytes())
    assert (PACKING_VERSION, digest.hexdigest()[:16]) == (2, "72daf4d2eaedd4b8")
