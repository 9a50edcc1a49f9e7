"""Worker: one rank's weights, KV cache and, where tokens are drawn, the sampler.

Computes its stage of the steps it is given; decides nothing about them. Tokens are drawn on rank 0
of the last stage.
"""

import json
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch

from engine.batch import PENDING, Batch, PromptScore, Sampling
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.executor import EngineInfo
from engine.kv_cache import KVCache, bytes_per_block, check_quant_policy
from engine.models import DecoderSpec, load_decoder, load_spec, resolve_dtype
from engine.models.rope import DynamicRope
from engine.outputs import StepResult, TokenLogprobs
from engine.parallel import ParallelGroup
from engine.sampler import Sampler, token_logprobs
from engine.weights.cache import WeightCache
from engine.weights.origin import Origin
from engine.weights.peers import Peers
from kernels.attention import AttentionMetadata

SCORE_ROWS = 256  # prompt tokens whose logits exist at once: 256 × 128k × 4 B = 131 MB


class Worker:
    def __init__(
        self, config: EngineConfig, group: ParallelGroup, peers: Peers | None = None
    ) -> None:
        """`peers` may have the packed weights, or a checkpoint that is not on this node."""
        self.device = resolve_device(config.device)
        if self.device == "cpu":
            torch.set_num_threads(config.threads_per_rank(group.num_neighbours))
        cache = _weight_cache(config, self.device, peers)
        origin = _find_origin(Path(config.model), peers if cache is not None else None)
        self.spec = load_spec(origin.settings)
        self.dtype = resolve_dtype(config.dtype, self.spec, self.device)
        self.block_size = block_size_of(config, self.device)
        check_quant_policy(self.spec, config.quant_policy, self.device)
        self._group = group
        limit = session_limit(config, self.spec)
        self._decoder = load_decoder(
            origin,
            self.spec,
            dtype=self.dtype,
            device=self.device,
            group=group,
            int8_activations=config.int8_activations,
            session_len=limit,
            cache=cache,
        )
        check_same(origin, self.spec, group)  # they have loaded, too: what is free now stays so
        mapped_bytes = cache.mapped_bytes if cache is not None else 0
        self.num_blocks = group.min(self._count_blocks(config, limit, mapped_bytes))
        self.session_len = min(limit, self.num_blocks * self.block_size)
        if config.session_len is not None and self.session_len < limit:
            raise ConfigError(
                f"session_len {limit} does not fit the KV cache, which holds {self.session_len} "
                "tokens; lower session_len, or raise cache_max_entry_count (on a CPU also "
                "max_cpu_cache_bytes)"
            )
        self._kv_cache = KVCache.allocate(
            self.spec,
            self.num_blocks,
            self.block_size,
            self.dtype,
            self.device,
            group.size,
            len(self._decoder.layers),
            config.quant_policy,
        )
        self._tables = BlockTables(config.max_num_seqs, self.session_len, self.block_size)
        self._sampler = Sampler(
            self.spec.vocab_size, config.max_num_seqs, self.session_len, self.device
        )

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            vocab_size=self.spec.vocab_size,
            session_len=self.session_len,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device,
            tp=self._group.size,
            pp=self._group.num_stages,
            max_in_flight=self._group.num_stages,
        )

    def execute(self, batch: Batch, sampling: Sampling | None) -> StepResult | None:
        """Run one step where all layers are here; the result exists on rank 0, as `sampling`."""
        return self.finish(batch, self.forward(batch, None), sampling)

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """This stage's layers: [T, H] of the stage before (None: this is the first) -> [T, H]."""
        assert batch.input_ids.min() != PENDING, "this worker is not driven ahead"
        places = self._tables.advance(batch)
        meta = AttentionMetadata.build(
            batch.query_start_loc,
            batch.context_lens,
            places.block_tables,
            places.slot_mapping,
            batch.num_decodes,
            self.block_size,
            self.device,
        )
        if hidden is None:
            hidden = torch.from_numpy(batch.input_ids).to(self.device, torch.int64)
        positions = torch.from_numpy(places.positions).to(self.device, torch.int64)
        return self._decoder.forward(hidden, positions, meta, self._kv_cache)

    @torch.inference_mode()
    def finish(
        self, batch: Batch, hidden: torch.Tensor, sampling: Sampling | None
    ) -> StepResult | None:
        """Draw and score tokens from the last stage's [T, H]; only its rank 0 has `sampling`."""
        indices = torch.from_numpy(batch.logit_indices).to(self.device, torch.int64)
        logits = self._decoder.logits(hidden[indices[: batch.num_sampled]])
        scored = self._score(hidden, indices[batch.num_sampled :], sampling)
        if sampling is None:
            return None
        assert logits is not None, "logits are gathered on rank 0 of the stage"
        sampled = self._sampler.sample(logits, sampling.batch)
        return StepResult(sampled.token_ids, sampled.logprobs, scored, sampled.invalid)

    def _score(
        self, hidden: torch.Tensor, indices: torch.Tensor, sampling: Sampling | None
    ) -> list[tuple[int, list[TokenLogprobs]]]:
        """Log probabilities of known prompt tokens; every rank takes part in the gathers."""
        entries: list[TokenLogprobs] = []
        scores = sampling.scores if sampling is not None else []
        token_ids = torch.tensor([t for score in scores for t in score.token_ids])
        num_top = max((score.num_top for score in scores), default=0)
        for start in range(0, len(indices), SCORE_ROWS):
            logits = self._decoder.logits(hidden[indices[start : start + SCORE_ROWS]])
            if logits is not None:
                entries += token_logprobs(logits, token_ids[start : start + SCORE_ROWS], num_top)
        return _split(entries, scores)

    def _count_blocks(self, config: EngineConfig, session_len: int, mapped_bytes: int) -> int:
        """KV blocks this rank can afford, and no more than max_num_seqs full sessions need.

        `mapped_bytes` of weights count as available memory, but every step needs them. The ranks
        of a node have about equal parts of both.
        """
        if isinstance(config.cache_max_entry_count, int):
            return config.cache_max_entry_count
        num_layers = len(self._decoder.layers)
        block_bytes = bytes_per_block(
            self.spec,
            self.block_size,
            self.dtype,
            self._group.size,
            num_layers,
            config.quant_policy,
        )
        free = max(0, free_memory(self.device) - mapped_bytes * self._group.num_neighbours)
        budget = int(free * config.cache_max_entry_count)
        if self.device == "cpu":
            budget = min(budget, config.max_cpu_cache_bytes) // self._group.num_neighbours
        useful = config.max_num_seqs * -(-session_len // self.block_size)
        num_blocks = min(budget // block_bytes, useful)
        if num_blocks < 2:
            raise ConfigError(
                f"no room for the KV cache: {free / 2**30:.1f} GiB are free on {self.device}, one "
                f"block of {self.block_size} tokens takes {block_bytes / 2**20:.1f} MiB; raise "
                "cache_max_entry_count or use more ranks (tp, pp)"
            )
        return num_blocks


def _weight_cache(config: EngineConfig, device: str, peers: Peers | None) -> WeightCache | None:
    """None where the setting says so, and on a GPU: what it computes with today are dequantised
    weights, four times the checkpoint's bytes.
    """
    directory = config.weights_cache_directory()
    if directory is None or device != "cpu":
        return None
    return WeightCache(directory, config.max_weights_cache_bytes, peers)


def _find_origin(checkpoint: Path, peers: Peers | None) -> Origin:
    return Origin.at(checkpoint) if peers is None else peers.origin(checkpoint)


def check_same(origin: Origin, spec: DecoderSpec, group: ParallelGroup) -> None:
    """CheckpointError when the ranks have different config.json, or when one without the
    checkpoint got another version than the others.

    Ranks that read checkpoints of their own may see other times of change, hence other files.
    """
    if not _equal(repr(spec), group):
        raise CheckpointError(
            f"the ranks read different settings in config.json of {origin.checkpoint}; copy the "
            "checkpoint of one node to all others that have it"
        )
    if group.min(origin.here) == 0 and not _equal(json.dumps(origin.files), group):
        raise CheckpointError(
            f"the ranks have different versions of {origin.checkpoint}, which not every node has; "
            "it was changed or announced meanwhile. Start again, or copy it to every node"
        )


def _equal(text: str, group: ParallelGroup) -> bool:
    """On all ranks."""
    digest = crc32(text.encode())
    return group.min(digest) == -group.min(-digest)


def block_size_of(config: EngineConfig, device: str) -> int:
    """Attention tiles on GPUs want 64."""
    return config.block_size or (16 if device == "cpu" else 64)


def session_limit(config: EngineConfig, spec: DecoderSpec) -> int:
    """The longest sequence by config and checkpoint; the cache may allow less."""
    trained = spec.max_position_embeddings
    limit = config.session_len or trained
    if limit > trained and not isinstance(spec.rope, DynamicRope):
        raise ConfigError(
            f"session_len {limit} is beyond the {trained} positions this checkpoint was made for; "
            "only rope type 'dynamic' stretches further"
        )
    return limit


def resolve_device(device: str) -> str:
    """ "auto" becomes cuda when there is one; ConfigError when cuda is asked for and absent."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch sees no GPU; use 'cpu' or 'auto'")
    return device


def free_memory(device: str) -> int:
    """Bytes a new allocation could use now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):  # counts the page cache, which the kernel gives back
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable; set cache_max_entry_count to a number")


def _split(
    entries: list[TokenLogprobs], scores: list[PromptScore]
) -> list[tuple[int, list[TokenLogprobs]]]:
    parts: list[tuple[int, list[TokenLogprobs]]] = []
    start = 0
    for score in scores:
        end = start + len(score.token_ids)
        parts.append(
            (score.seq_index, [_cut(entry, score.num_top) for entry in entries[start:end]])
        )
        start = end
    return parts


def _cut(entry: TokenLogprobs, num_top: int) -> TokenLogprobs:
    """A step scores with the most alternatives anybody asked for."""
    return replace(
        entry,
        top_token_ids=entry.top_token_ids[:num_top],
        top_logprobs=entry.top_logprobs[:num_top],
    )
