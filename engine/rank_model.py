"""RankModel: one rank's weights, and what they and the settings say about steps and memory.

What the workers of CPUs (engine/worker.py) and GPUs (engine/gpu_worker.py) have in common before
anything is computed. It holds no keys and values.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.executor import EngineInfo
from engine.kv_cache import KVCache, bytes_per_block, check_quant_policy
from engine.models import DecoderSpec, load_decoder, load_spec, resolve_dtype
from engine.models.decoder import Decoder
from engine.models.rope import DynamicRope
from engine.parallel import ParallelGroup
from engine.weights.cache import WeightCache
from engine.weights.origin import Origin
from engine.weights.peers import Peers
from kernels.gpu import interpreted

MIN_CAPABILITY = (8, 0)  # bf16 on the matrix units, asynchronous copies
MIN_GPU_BLOCK_SIZE = 16  # tokens of the smallest tile, which lies in one block


@dataclass(frozen=True, slots=True, kw_only=True)
class RankModel:
    config: EngineConfig
    group: ParallelGroup
    device: str  # cpu or cuda
    spec: DecoderSpec
    dtype: torch.dtype
    block_size: int
    session_limit: int  # by config and checkpoint; the cache may allow less
    decoder: Decoder
    mapped_bytes: int  # of weights that count as available memory, but that every step needs

    @classmethod
    def load(
        cls, config: EngineConfig, group: ParallelGroup, device: str, peers: Peers | None
    ) -> "RankModel":
        """`peers` may have the packed weights, or a checkpoint that is not on this node."""
        if device == "cuda":
            check_gpu()
        if config.quantize is None:
            return cls._load(Path(config.model), config, group, device, peers)
        # Reading text for a calibration costs three seconds of imports.
        from engine.quantize.on_load import quantized_checkpoint

        with quantized_checkpoint(config, tensor_device(device)) as found:
            check_same_quantized(found.crc32, config, group)
            return cls._load(found.path, config, group, device, None)

    @classmethod
    def _load(
        cls,
        checkpoint: Path,
        config: EngineConfig,
        group: ParallelGroup,
        device: str,
        peers: Peers | None,
    ) -> "RankModel":
        block_size = block_size_of(config, device)
        directory = config.weights_cache_directory()
        cache = None
        if directory is not None:
            cache = WeightCache(directory, config.max_weights_cache_bytes, peers)
        origin = _find_origin(checkpoint, peers if cache is not None else None)
        spec = load_spec(origin.settings)
        dtype = resolve_dtype(config.dtype, spec, device)
        limit = session_limit(config, spec)
        check_quant_policy(spec, config.quant_policy, device)
        decoder = load_decoder(
            origin,
            spec,
            dtype=dtype,
            device=tensor_device(device),
            group=group,
            int8_activations=config.int8_activations,
            session_len=limit,
            cache=cache,
        )
        check_same(origin, spec, group)  # they have loaded, too: what is free now stays so
        return cls(
            config=config,
            group=group,
            device=device,
            spec=spec,
            dtype=dtype,
            block_size=block_size,
            session_limit=limit,
            decoder=decoder,
            mapped_bytes=cache.mapped_bytes if cache is not None and device == "cpu" else 0,
        )

    @property
    def tensor_device(self) -> str:
        return tensor_device(self.device)

    @property
    def has_graphs(self) -> bool:
        """Stages hand their hidden states on, so that with several every step runs eagerly."""
        on_gpu = self.device == "cuda"
        return self.config.enable_cuda_graphs and on_gpu and self.group.num_stages == 1

    def count_blocks(self, free: int) -> int:
        """KV blocks that all ranks can afford, and no more than max_num_seqs full sessions need.

        `free`: bytes that this rank could allocate now. The ranks of a node share a CPU's. When it
        is not enough on one of them, ConfigError on all: none waits for one that has failed.
        """
        config, group = self.config, self.group
        wanted = config.cache_max_entry_count
        block_bytes = bytes_per_block(
            self.spec,
            self.block_size,
            self.dtype,
            group.size,
            len(self.decoder.layers),
            config.quant_policy,
        )
        free = max(0, free - self.mapped_bytes * group.num_neighbours)
        if isinstance(wanted, int):
            least, mend = wanted, "lower"
            # Pages of a CPU's cache take memory when they are first written.
            affordable = wanted if self.device == "cpu" else min(wanted, free // block_bytes)
        else:
            least, mend = 2, "raise"
            budget = int(free * wanted)
            if self.device == "cpu":
                budget = min(budget, config.max_cpu_cache_bytes) // group.num_neighbours
            useful = config.max_num_seqs * -(-self.session_limit // self.block_size)
            affordable = min(budget // block_bytes, max(least, useful))
        num_blocks = group.min(affordable)
        if num_blocks < least:
            where = f"on {self.device}" + ", on another rank less" * (affordable > num_blocks)
            raise ConfigError(
                f"no room for the KV cache: {free / 2**30:.1f} GiB are free {where}; a block of "
                f"{self.block_size} tokens takes {block_bytes / 2**20:.1f} MiB, and {least} are "
                f"needed; {mend} cache_max_entry_count or use more ranks (tp, pp)"
            )
        return num_blocks

    def allocate_cache(self, num_blocks: int) -> KVCache:
        return KVCache.allocate(
            self.spec,
            num_blocks,
            self.block_size,
            self.dtype,
            self.tensor_device,
            self.group.size,
            len(self.decoder.layers),
            self.config.quant_policy,
        )

    def info(self, num_blocks: int, max_in_flight: int) -> EngineInfo:
        """ConfigError when the session that was asked for does not fit so many blocks."""
        session_len = min(self.session_limit, num_blocks * self.block_size)
        if self.config.session_len is not None and session_len < self.session_limit:
            raise ConfigError(
                f"session_len {self.session_limit} does not fit the KV cache, which holds "
                f"{session_len} tokens; lower session_len, or raise cache_max_entry_count (on a "
                "CPU also max_cpu_cache_bytes)"
            )
        return EngineInfo(
            vocab_size=self.spec.vocab_size,
            session_len=session_len,
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device,
            tp=self.group.size,
            pp=self.group.num_stages,
            max_in_flight=max_in_flight,
            cuda_graphs=self.has_graphs,
        )


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


def check_same_quantized(crc32: int, config: EngineConfig, group: ParallelGroup) -> None:
    """CheckpointError when nodes that quantised for themselves came to different weights.

    Searches for scales compare sums, whose rounding differs between kinds of CPUs and GPUs.
    """
    if not _equal(str(crc32), group):
        raise CheckpointError(
            f"quantize {config.quantize} gave different weights on the nodes of this engine; "
            f"quantise {config.model} once with `manta lite`, copy the result to every node and "
            "serve that"
        )


def _equal(text: str, group: ParallelGroup) -> bool:
    """On all ranks."""
    digest = crc32(text.encode())
    return group.min(digest) == -group.min(-digest)


def block_size_of(config: EngineConfig, device: str) -> int:
    """Attention tiles on GPUs want 64. ConfigError for less than the smallest of them."""
    size = config.block_size or (16 if device == "cpu" else 64)
    if device == "cuda" and size < MIN_GPU_BLOCK_SIZE:
        raise ConfigError(
            f"block_size must be at least {MIN_GPU_BLOCK_SIZE} on a GPU, got {size}; leave it out "
            "for 64"
        )
    return size


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
    if device == "cuda" and not torch.cuda.is_available() and not interpreted():
        raise ConfigError("device is 'cuda' but torch sees no GPU; use 'cpu' or 'auto'")
    return device


def check_gpu() -> None:
    """ConfigError for one that the kernels are not made for; in the interpreter there is none."""
    if interpreted():
        return
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        raise ConfigError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}."
            f"{capability[1]}; GPUs from 8.0 (Ampere) on can be used, or device 'cpu'"
        )


def tensor_device(device: str) -> str:
    """Where tensors for this device lie: in Triton's interpreter a GPU's lie on the CPU."""
    return "cpu" if device == "cuda" and interpreted() else device


def free_memory(device: str) -> int:
    """Bytes a new allocation could use now."""
    if tensor_device(device) == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):  # counts the page cache, which the kernel gives back
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable; set cache_max_entry_count to a number")
