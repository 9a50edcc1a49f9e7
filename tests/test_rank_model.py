"""What the GPU's kernels cannot do is refused before weights are read."""

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.parallel import ParallelGroup
from engine.rank_model import RankModel


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


def test_blocks_smaller_than_a_tile() -> None:
    config = EngineConfig(model="/nowhere", device="cuda", block_size=8)
    with pytest.raises(ConfigError, match="block_size must be at least 16 on a GPU, got 8"):
        RankModel.load(config, ParallelGroup(), "cuda", None)


def test_a_gpu_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    config = EngineConfig(model="/nowhere", device="cuda")
    with pytest.raises(
        ConfigError, match=r"NVIDIA Old has compute capability 7\.5; GPUs from 8\.0"
    ):
        RankModel.load(config, ParallelGroup(), "cuda", None)
