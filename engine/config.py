"""EngineConfig: every number the engine is told, frozen, from YAML or keyword arguments.

Facts learned at run time (block count, the checkpoint's context length) are return values of
the code that learns them, never written back here.
"""

import difflib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "bfloat16", "float16", "float32"]
Placement = Literal["node", "stages", "ranks"]
Quantize = Literal["awq", "rtn", "int8"]
QUANT_POLICIES = (0, 4, 8, 16)
QUANTIZE = ("awq", "rtn", "int8")
GiB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine group.

    cache_max_entry_count has LMDeploy's meaning: a float in (0, 1) is the share of the memory
    free after the weights are loaded, an integer is a number of KV blocks. On the CPU the share
    is capped at max_cpu_cache_bytes per node, because "free" there belongs to everyone.
    """

    model: str  # directory of a Hugging Face checkpoint
    # A dense checkpoint is quantised when it is loaded, once per node, into weights_cache.
    quantize: Quantize | None = None
    dtype: DType = "auto"  # auto: what the checkpoint says (float16 becomes bfloat16 on CPU)
    device: Device = "auto"  # auto: cuda when there is one
    tp: int = 1  # ranks that share each layer
    pp: int = 1  # stages of consecutive layers, each on tp ranks; as many batches in flight
    # Under Ray. node: all ranks on one; stages: each stage on one; ranks: wherever there is room.
    placement: Placement = "node"
    session_len: int | None = None  # None: the checkpoint's max_position_embeddings
    max_num_seqs: int = 256  # sequences running at once
    max_num_batched_tokens: int = 2048  # tokens one step computes at most
    max_waiting_requests: int = 1024  # admission: waiting sequences beyond this are refused
    max_waiting_tokens: int = 1_000_000  # admission: waiting prompt tokens
    block_size: int | None = None  # tokens per KV block; None: 16 on CPU, 64 on GPU
    # Keys and values in the cache: 0: as the activations; 8 and 4: so many bits, with a scale and
    # a zero per token and head; 16: fp8 (e4m3). The numbers are LMDeploy's.
    quant_policy: int = 0
    cache_max_entry_count: float | int = 0.8
    max_cpu_cache_bytes: int = 2 * GiB
    enable_prefix_caching: bool = True
    int8_activations: bool = False  # CPU: rows to int8, lm_head too; faster, not exact
    num_threads: int | None = None  # CPU threads of each rank; None: cores / ranks of the node
    enable_cuda_graphs: bool = True  # GPU, pp 1: steps of decode rows alone are replayed
    enable_async_scheduling: bool = True  # GPU, pp 1: the next step is launched while one runs
    seed: int | None = None  # draws of requests without a seed; None: different at every start
    step_timeout_s: int = 120  # a step that takes longer counts as hung
    # Directory of packed weights that all engines of a node map or copy; auto: manta in
    # $XDG_CACHE_HOME or ~/.cache; None: every engine packs a copy of its own.
    weights_cache: str | None = "auto"
    max_weights_cache_bytes: int = 100 * GiB  # beyond it the oldest unused files are deleted

    def __post_init__(self) -> None:
        _check_types(self)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        share = self.cache_max_entry_count
        if isinstance(share, float) and not 0.0 < share < 1.0:
            raise ConfigError(
                "cache_max_entry_count must be a share between 0 and 1 (float) or a block count "
                f"(integer), got {share!r}"
            )
        if isinstance(share, int) and share < 2:
            raise ConfigError(
                f"cache_max_entry_count as a block count needs 2 or more, got {share}"
            )
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, got {self.block_size}")
        if self.quantize is not None and self.weights_cache is None:
            raise ConfigError(
                f"quantize {self.quantize} keeps the quantised checkpoint in weights_cache, which "
                "is null; name a directory or auto, or quantise once with `manta lite`"
            )
        if self.quant_policy and self.block_size is not None and self.block_size < 16:
            raise ConfigError(
                f"block_size must be at least 16 with quant_policy {self.quant_policy}, got "
                f"{self.block_size}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "engine config") -> "EngineConfig":
        """Build from parsed YAML; an unknown key is refused with its nearest known one."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
                raise ConfigError(f"{source}: unknown key {key!r}; {hint}")
        if "model" not in values:
            raise ConfigError(f"{source}: the key 'model' (a checkpoint directory) is missing")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "EngineConfig":
        """Read a YAML file; `overrides` that are not None win over the file."""
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read engine config {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"engine config {path} must be a mapping of settings, got {values!r}")
        values |= {key: value for key, value in overrides.items() if value is not None}
        return cls.from_dict(values, str(path))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def threads_per_rank(self, num_neighbours: int) -> int:
        """CPU threads of one rank: spinning pools that share a core ruin each other.

        `num_neighbours`: ranks on this node, itself included.
        """
        cores = len(os.sched_getaffinity(0))
        return self.num_threads or max(1, cores // num_neighbours)

    def weights_cache_directory(self) -> Path | None:
        """Where this node's packed weights lie; None: nowhere."""
        if self.weights_cache != "auto":
            return Path(self.weights_cache).expanduser() if self.weights_cache else None
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "manta"


_POSITIVE = (
    "tp",
    "pp",
    "session_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_waiting_requests",
    "max_waiting_tokens",
    "block_size",
    "max_cpu_cache_bytes",
    "num_threads",
    "step_timeout_s",
    "max_weights_cache_bytes",
)
_SWITCHES = (
    "enable_prefix_caching",
    "int8_activations",
    "enable_cuda_graphs",
    "enable_async_scheduling",
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "device": ("auto", "cpu", "cuda"),
    "placement": ("node", "stages", "ranks"),
}


def _check_types(config: EngineConfig) -> None:
    """YAML gives any type: refuse a wrong one by name instead of failing later."""
    if config.quantize not in (None, *QUANTIZE):
        methods = ", ".join(QUANTIZE)
        raise ConfigError(f"quantize must be one of {methods} or null, got {config.quantize!r}")
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(
                f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}"
            )
    for name in (*_POSITIVE, "seed"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{name} must be an integer, got {value!r}")
    policy = config.quant_policy
    if isinstance(policy, bool) or not isinstance(policy, int) or policy not in QUANT_POLICIES:
        policies = ", ".join(map(str, QUANT_POLICIES))
        raise ConfigError(f"quant_policy must be one of {policies}, got {policy!r}")
    for name in _SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be true or false, got {getattr(config, name)!r}")
    share = config.cache_max_entry_count
    if not isinstance(share, (int, float)) or isinstance(share, bool):
        raise ConfigError(f"cache_max_entry_count must be a number, got {share!r}")
    directory = config.weights_cache
    if directory is not None and (not isinstance(directory, str) or not directory):
        raise ConfigError(f"weights_cache must be auto, a directory or null, got {directory!r}")
    if not isinstance(config.model, str) or not config.model:
        raise ConfigError(f"model must be a checkpoint directory, got {config.model!r}")
