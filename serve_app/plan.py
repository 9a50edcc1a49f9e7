"""What a checkpoint needs, and what then fits a GPU or a machine, for every tp that cuts it evenly.

Pure arithmetic over the engine's own answers: the weights' packing, bytes_per_block, and the
rules by which a worker counts its KV blocks. Knows no terminal; needs no GPU and no weights.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_cache import bytes_per_block, check_head_dim
from engine.models import DecoderSpec, check_tp, resolve_dtype, stage_layers
from engine.models.footprint import Footprint, footprint
from engine.rank_model import block_size_of, session_limit
from serve_app.plan_gpus import Memory

MAX_TP = 8  # ranks to try when nobody said how many GPUs there are
# Of each rank, before any weight: a CUDA context with its libraries' workspaces; on a CPU an
# engine process with torch (0.4 GiB) and its part of the replica and of Ray.
RANK_BYTES = 1024**3

Device: TypeAlias = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True)
class TpPlan:
    """One tp. Bytes are of a rank of the fullest stage; sequences and tokens/s of one replica."""

    tp: int
    weight_bytes: int
    kv_bytes_per_token: int
    free_bytes: int  # after the weights; negative: they do not fit
    kv_tokens: int
    num_sequences: int  # at the whole context
    decode_bound: float | None  # tokens/s of one sequence at the whole context, by bandwidth alone
    decode_bound_all: float | None  # of num_sequences together
    num_replicas: int | None  # that the given GPUs make

    @property
    def fits(self) -> bool:
        return self.num_sequences > 0


@dataclass(frozen=True, slots=True)
class Plan:
    device: Device
    memory: Memory
    dtype: torch.dtype
    quant_policy: int
    session_len: int
    pp: int
    rows: tuple[TpPlan, ...]

    @property
    def best(self) -> TpPlan | None:
        """The smallest tp that fits: fewer ranks talk less, and more replicas go in."""
        return next((row for row in self.rows if row.fits), None)


class Planner:
    def __init__(self, spec: DecoderSpec, config: EngineConfig, device: Device) -> None:
        self._dtype = resolve_dtype(config.dtype, spec, device)
        self._session_len = session_limit(config, spec)
        self._spec, self._config, self._device = spec, config, device
        self._block_size = block_size_of(config, device)
        check_head_dim(spec, config.quant_policy)
        self._known: dict[int, list[Footprint]] = {}

    def plan(self, memory: Memory, num_gpus: int | None = None) -> Plan:
        pp, rows = self._config.pp, []
        for tp in range(1, (num_gpus or MAX_TP) // pp + 1):
            try:
                check_tp(self._spec, tp)
            except ConfigError:
                continue
            num_replicas = None if num_gpus is None else num_gpus // (tp * pp)
            rows.append(self._row(memory, tp, num_replicas))
        if not rows:
            raise ConfigError(f"--gpus {num_gpus} are fewer than the {pp} stages of pp")
        return Plan(
            device=self._device,
            memory=memory,
            dtype=self._dtype,
            quant_policy=self._config.quant_policy,
            session_len=self._session_len,
            pp=pp,
            rows=tuple(rows),
        )

    def _row(self, memory: Memory, tp: int, num_replicas: int | None) -> TpPlan:
        """The fullest stage decides; on a CPU all ranks share the memory."""
        stages = self._footprints(tp)
        kv = [self._kv_bytes_per_token(tp, stage) for stage in range(self._config.pp)]
        taken = [stage.weights + stage.scratch + RANK_BYTES for stage in stages]
        if self._device == "cpu":
            taken = [tp * sum(taken)] * len(taken)
        free = [memory.num_bytes - each for each in taken]
        num_blocks = min(map(self._num_blocks, free, kv, [tp] * len(kv)))
        num_sequences = min(self._config.max_num_seqs, num_blocks // self._blocks_per_session)
        sharing = tp if self._device == "cpu" else 1
        weights = [sharing * stage.read_per_step for stage in stages]
        contexts = [sharing * each * self._session_len for each in kv]
        return TpPlan(
            tp=tp,
            weight_bytes=max(stage.weights for stage in stages),
            kv_bytes_per_token=max(kv),
            free_bytes=min(free),
            kv_tokens=num_blocks * self._block_size,
            num_sequences=num_sequences,
            decode_bound=_decode_bound(memory, weights, contexts, min(1, num_sequences)),
            decode_bound_all=_decode_bound(memory, weights, contexts, num_sequences),
            num_replicas=num_replicas,
        )

    @property
    def _blocks_per_session(self) -> int:
        return -(-self._session_len // self._block_size)

    def _footprints(self, tp: int) -> list[Footprint]:
        """Of each stage."""
        if tp not in self._known:
            self._known[tp] = [
                footprint(
                    self._spec,
                    tp=tp,
                    dtype=self._dtype,
                    device=self._device,
                    session_len=self._session_len,
                    stage=stage,
                    pp=self._config.pp,
                )
                for stage in range(self._config.pp)
            ]
        return self._known[tp]

    def _kv_bytes_per_token(self, tp: int, stage: int) -> int:
        num_layers = len(stage_layers(self._spec.num_layers, stage, self._config.pp))
        policy = self._config.quant_policy
        return bytes_per_block(self._spec, 1, self._dtype, tp, num_layers, policy)

    def _num_blocks(self, free: int, kv_bytes_per_token: int, tp: int) -> int:
        """As Worker counts them when it starts."""
        config = self._config
        sharing = tp * config.pp if self._device == "cpu" else 1
        block_bytes = kv_bytes_per_token * self._block_size
        share = config.cache_max_entry_count
        if isinstance(share, int):
            return share if share * block_bytes * sharing <= free else 0
        budget = int(max(0, free) * share)
        if self._device == "cpu":
            budget = min(budget, config.max_cpu_cache_bytes) // sharing
        return min(budget // block_bytes, config.max_num_seqs * self._blocks_per_session)


def _decode_bound(
    memory: Memory, weights: list[int], contexts: list[int], num_sequences: int
) -> float | None:
    """Tokens/s of steps that do nothing but read a stage's weights once and each sequence's keys
    and values: no computation, no communication, the maker's bandwidth.

    One sequence passes the stages one after the other. Many are as many batches as there are
    stages, each of which reads its weights for every batch; the slowest one decides.
    """
    if memory.bandwidth is None or num_sequences == 0:
        return None
    if num_sequences == 1:
        return memory.bandwidth / (sum(weights) + sum(contexts))
    num_batches = min(len(weights), num_sequences)
    reads = (
        num_batches * each + num_sequences * context
        for each, context in zip(weights, contexts, strict=True)
    )
    return num_sequences * memory.bandwidth / max(reads)
