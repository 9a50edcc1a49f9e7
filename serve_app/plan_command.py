"""`manta plan`: from the command's words to a plan's text."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.models import load_spec
from engine.models.footprint import checkpoint_bytes
from engine.models.hf_config import read_json
from engine.models.spec import DecoderSpec
from engine.quantize.recipes import quantized_spec
from engine.rank_model import free_memory
from engine.weights.checkpoint import INDEX_FILE
from serve_app.plan import Device, Planner
from serve_app.plan_gpus import Memory, known_gpu, read_size
from serve_app.plan_report import to_json, to_text


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which memory to plan for."""

    gpu: str | None = None
    num_gpus: int | None = None
    memory: str | None = None
    bandwidth: float | None = None  # GB/s
    cpu: bool = False

    @property
    def device(self) -> Device:
        return "cpu" if self.cpu else "cuda"

    def resolve(self) -> Memory:
        """ConfigError when it does not say one memory."""
        if self.cpu and (self.gpu or self.num_gpus):
            raise ConfigError("--cpu plans for a machine without GPUs: drop --gpu, --gpus")
        if self.gpu and (self.memory or self.bandwidth):
            raise ConfigError("--memory and --bandwidth describe a GPU that --gpu does not know")
        if self.gpu:
            return known_gpu(self.gpu)
        if not self.memory and not self.cpu:
            raise ConfigError("plan for what? Give --gpu H100-80GB, --memory 80GiB or --cpu")
        name = "memory" if not self.cpu else "this machine" if not self.memory else "machine"
        size = read_size(self.memory) if self.memory else free_memory("cpu")
        return Memory(name, size, self.bandwidth * 1e9 if self.bandwidth else None)


def run_plan(
    model: str, wanted: Wanted, config: Path | None, settings: dict[str, Any], *, as_json: bool
) -> tuple[bool, str]:
    """Whether anything fits, and what to print."""
    memory = wanted.resolve()
    path = Path(model).expanduser()
    path = path.parent if path.name == "config.json" else path
    spec = load_spec(path)
    engine = _engine_config(path, config, settings)
    if engine.quantize is not None:
        spec = quantized_spec(spec, engine.quantize)
    plan = Planner(spec, engine, wanted.device).plan(memory, wanted.num_gpus)
    size = _stored_bytes(path, spec)
    name = path.resolve().name
    text = to_json(name, size, plan) if as_json else to_text(name, spec, size, plan)
    return plan.best is not None, text


def _engine_config(path: Path, config: Path | None, settings: dict[str, Any]) -> EngineConfig:
    given = {key: value for key, value in settings.items() if value is not None}
    if config is not None:
        return replace(EngineConfig.from_yaml(config), model=str(path), **given)
    return EngineConfig(model=str(path), **given)


def _stored_bytes(path: Path, spec: DecoderSpec) -> int:
    """As the files or their index say, else as the config comes to."""
    files = [file.stat().st_size for file in path.glob("*.safetensors")]
    index = path / INDEX_FILE
    if index.is_file():
        metadata = read_json(index).get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            return int(metadata["total_size"])
    return sum(files) or checkpoint_bytes(spec)
