"""The finished checkpoint out of a source and its quantised layers, as a directory of its own.

Whatever is outside of the layers is copied as it is stored, tensor by tensor. Settings, tokenizer
and licence come along; code never does. This module knows neither methods nor formats.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from engine.models.hf_config import read_json
from engine.models.layout import HARMLESS, layer_prefix
from engine.models.spec import DecoderSpec
from engine.quantize.files import LazyTensor, write_bytes, write_json, write_tensors
from engine.weights.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from engine.weights.origin import settings_files

MAX_SHARD_BYTES = 5 * 10**9
# README.md is left out: it describes the source.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
REPORTS = ("report.json",)  # of a quantisation: a source that came out of one has its own
METADATA = {"format": "pt"}

Shard = dict[str, LazyTensor]


def assemble(
    target: Path,
    source: Path,
    spec: DecoderSpec,
    layers: list[Path],
    quantization_config: Mapping[str, Any] | None,
) -> None:
    """Fill the empty directory `target`; `layers` are the files of finished layers, in order."""
    with ExitStack() as files:
        checkpoint = files.enter_context(Checkpoint(source))
        tensors = dict(_tensors(checkpoint, spec, layers, files))
        _write_shards(target, tensors, MAX_SHARD_BYTES)
    _write_config(target, source, quantization_config)
    _copy_settings(target, source)


def kept_tensors(checkpoint: Checkpoint, spec: DecoderSpec) -> list[str]:
    """Names of the tensors outside of the layers; what no loader reads is dropped."""
    prefixes = tuple(layer_prefix(spec, layer) for layer in range(spec.num_layers))
    return [
        name
        for name in checkpoint.tensors
        if not name.startswith(prefixes) and not name.endswith(HARMLESS)
    ]


def stored_bytes(checkpoint: Checkpoint, names: list[str]) -> int:
    return sum(_kept(checkpoint, name).num_bytes for name in names)


def _kept(checkpoint: Checkpoint, name: str) -> LazyTensor:
    stored = checkpoint.tensors[name]
    return LazyTensor(stored.shape, stored.dtype, partial(checkpoint.read, name))


def _tensors(
    checkpoint: Checkpoint, spec: DecoderSpec, layers: list[Path], files: ExitStack
) -> Iterator[tuple[str, LazyTensor]]:
    for name in kept_tensors(checkpoint, spec):
        yield name, _kept(checkpoint, name)
    for path in layers:
        handle: Any = files.enter_context(safe_open(path, framework="pt"))
        for name in handle.keys():  # noqa: SIM118 - safe_open is not a mapping
            part = handle.get_slice(name)
            read: partial[Tensor] = partial(handle.get_tensor, name)
            yield name, LazyTensor(tuple(part.get_shape()), part.get_dtype(), read)


def _write_shards(target: Path, tensors: Shard, max_bytes: int) -> None:
    shards = _deal(tensors, max_bytes)
    if len(shards) == 1:
        write_tensors(target / SINGLE_FILE, tensors, METADATA)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(target / file, shard, METADATA)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(target / INDEX_FILE, index)


def _deal(tensors: Shard, max_bytes: int) -> list[Shard]:
    """Runs of at most `max_bytes`; a tensor that is larger is a shard of its own."""
    shards: list[Shard] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    return shards


def _write_config(
    target: Path, source: Path, quantization_config: Mapping[str, Any] | None
) -> None:
    config = read_json(source / "config.json")
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    write_json(target / "config.json", config)


def _copy_settings(target: Path, source: Path) -> None:
    found = [*settings_files(source), *(f for name in LICENCES for f in source.glob(name))]
    for file in found:
        if file.name in ("config.json", *REPORTS) or not file.is_file():
            continue
        write_bytes(target / file.name, file.read_bytes())
