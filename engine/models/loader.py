"""load_decoder: one rank's Decoder, from its checkpoint or from the node's shared files.

Both sources are mappings of the same names (engine/models/rank_weights.py) to the same values, so
that the decoder is built in one way.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.models.decoder import MLP, Attention, Decoder, DecoderLayer
from engine.models.layout import HARMLESS, expected_tensors, optional_tensors
from engine.models.linear import (
    GatedLinear,
    Linear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from engine.models.rank_weights import Named, RankWeights, has_head
from engine.models.rope import rotary_table
from engine.models.sharding import Shard, check_pp, check_tp
from engine.models.spec import DecoderSpec
from engine.parallel import ParallelGroup
from engine.weights.cache import WeightCache
from engine.weights.checkpoint import Checkpoint
from engine.weights.origin import Origin, weights_fingerprint
from engine.weights.packed_file import Packed
from engine.weights.upload import to_host, upload
from kernels.dense_linear import DenseWeight
from kernels.gpu import interpreted
from kernels.rope import RotaryTable, signed_sin
from kernels.stored_weight import Weight, layouts


def load_decoder(
    checkpoint: str | Path | Origin,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype,
    device: str,
    group: ParallelGroup,
    int8_activations: bool = False,
    session_len: int | None = None,
    cache: WeightCache | None = None,
) -> Decoder:
    """The weights of `group.rank`, checked, cut and packed; with a `cache` its file's.

    On a CPU they are the file's pages, on a GPU copies of them.

    `session_len` is the number of positions to prepare; None: max_position_embeddings.
    """
    check_tp(spec, group.size)
    check_pp(spec, group.num_stages)
    session_len = session_len or spec.max_position_embeddings
    origin = checkpoint if isinstance(checkpoint, Origin) else Origin.at(Path(checkpoint))
    source = _Source(origin, spec, group, dtype, device, int8_activations)
    if cache is None:
        weights: Mapping[str, Packed] = dict(source.read())
    elif device == "cpu":
        weights = cache.load(source.name, source.key, source.read)
    else:
        stored = cache.load(source.name, source.key, lambda: to_host(source.read()))
        weights = upload(stored, device)
    return _Builder(weights, spec, group).decoder(dtype, device, session_len)


def _shard(spec: DecoderSpec, group: ParallelGroup) -> Shard:
    return Shard.of(spec, group.rank, group.size, group.stage, group.num_stages)


class _Source:
    """A rank's weights in their checkpoint, and how they are to be packed."""

    def __init__(
        self,
        origin: Origin,
        spec: DecoderSpec,
        group: ParallelGroup,
        dtype: torch.dtype,
        device: str,
        int8_activations: bool,
    ) -> None:
        self._origin = origin
        self._spec = spec
        self._shard = _shard(spec, group)
        self._packing = dtype, device, int8_activations
        # All that the packed weights depend on.
        self.key: dict[str, Any] = {
            "checkpoint": origin.checkpoint,
            "files": origin.files,
            "spec": repr(spec),
            "rank": group.global_rank,
            "tp": group.size,
            "pp": group.num_stages,
            "dtype": str(dtype),
            "device": "interpreter" if interpreted() else device,
            "int8_activations": int8_activations,
            **layouts(),
        }

    @property
    def name(self) -> str:
        """Readable, and different for every key; the ranks of one model stand together."""
        shared = {name: value for name, value in self.key.items() if name != "rank"}
        digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]
        model = re.sub(r"[^\w.-]", "_", Path(self._origin.checkpoint).name)[:80]
        num_ranks = self.key["tp"] * self.key["pp"]
        return f"{model}-{digest}.rank{self.key['rank']}-of-{num_ranks}"

    def read(self) -> Iterator[Named]:
        """Check the checkpoint, then read and pack; CheckpointError when it changes meanwhile."""
        if not self._origin.here:
            raise self._out_of_reach()
        path, spec = Path(self._origin.checkpoint), self._spec
        with Checkpoint(path) as checkpoint:
            own_head = not spec.tie_word_embeddings or has_head(checkpoint, spec)
            expected = expected_tensors(spec, head=own_head)
            checkpoint.verify(expected, HARMLESS, optional_tensors(spec))
            yield from RankWeights(checkpoint, spec, self._shard, *self._packing)
        if weights_fingerprint(path) != self._origin.files:
            raise CheckpointError(f"{path} changed while it was read; start again when it is whole")

    def _out_of_reach(self) -> CheckpointError:
        instructions, version = self.key["instructions"], self.key["torch"].split()[0]
        return CheckpointError(
            f"{self._origin.checkpoint} is not on this node, and no other node gave its weights "
            f"packed for {instructions} and torch {version}; put the checkpoint there, or start an "
            "engine first on a node that has it, the same kind of CPU and the same torch"
        )


class _Builder:
    """Puts a rank's weights into layers."""

    def __init__(
        self,
        weights: Mapping[str, Packed],
        spec: DecoderSpec,
        group: ParallelGroup,
    ) -> None:
        self._weights = weights
        self._spec = spec
        self._shard = _shard(spec, group)
        self._group = group

    def decoder(self, dtype: torch.dtype, device: str, session_len: int) -> Decoder:
        spec, shard = self._spec, self._shard
        cos, sin = rotary_table(spec.rope, spec.head_dim, session_len, dtype, device)
        return Decoder(
            embed=self._embed() if shard.is_first else None,
            layers=tuple(self._layer(i, session_len) for i in shard.layers),
            norm=self._tensor("norm") if shard.is_last else None,
            head=self._head() if shard.is_last else None,
            rotary=RotaryTable(cos, signed_sin(sin)),
            eps=spec.rms_norm_eps,
        )

    def _embed(self) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(self._tensor("embed"), self._shard.vocab.start, self._group)

    def _head(self) -> VocabParallelHead:
        weight = (
            self._weight("head")
            if "head" in self._weights
            else DenseWeight(self._tensor("embed"), reordered=False)
        )
        return VocabParallelHead(Linear(weight), self._spec.vocab_size, self._group)

    def _layer(self, index: int, session_len: int) -> DecoderLayer:
        name = f"layers.{index}"
        return DecoderLayer(
            input_norm=self._tensor(f"{name}.input_norm"),
            attention=self._attention(index, session_len),
            post_attention_norm=self._tensor(f"{name}.post_attention_norm"),
            mlp=MLP(
                gate_up=GatedLinear(self._linear(f"{name}.gate_up")),
                down=self._row_parallel(f"{name}.down"),
            ),
        )

    def _attention(self, index: int, session_len: int) -> Attention:
        spec, name, window = self._spec, f"layers.{index}", self._spec.windows[index]
        return Attention(
            qkv=self._linear(f"{name}.qkv"),
            o=self._row_parallel(f"{name}.o"),
            qk_norm=self._tensor(f"{name}.qk_norm") if spec.qk_norm else None,
            num_heads=len(self._shard.heads),
            num_kv_heads=len(self._shard.kv_heads),
            head_dim=spec.head_dim,
            # A window that no sequence can outgrow would only cost a mask.
            window=window if window is not None and window < session_len else None,
            eps=spec.rms_norm_eps,
        )

    def _linear(self, name: str) -> Linear:
        return Linear(self._weight(f"{name}.weight"), self._bias(name))

    def _row_parallel(self, name: str) -> RowParallelLinear:
        if self._group.size == 1:  # nothing to sum: the linear adds its bias itself
            return RowParallelLinear(self._linear(name), None, self._group)
        weight = self._weight(f"{name}.weight")
        return RowParallelLinear(Linear(weight), self._bias(name), self._group)

    def _bias(self, name: str) -> Tensor | None:
        return self._tensor(f"{name}.bias") if f"{name}.bias" in self._weights else None

    def _tensor(self, name: str) -> Tensor:
        return cast(Tensor, self._weights[name])

    def _weight(self, name: str) -> Weight:
        return cast(Weight, self._weights[name])
