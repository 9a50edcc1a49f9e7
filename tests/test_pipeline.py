"""Stages of layers in processes of their own give the tokens of one process, whatever is asked."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from engine.engine import Engine
from engine.errors import ConfigError
from engine.local_executor import LocalExecutor
from engine.models import check_pp, load_spec, stage_layers
from engine.outputs import SequenceOutput
from tests.pipeline_rank import Job, everything, run_rank
from tests.test_engine import prompts
from tests.test_parallel import HAS_IPV6
from tests.test_tensor_parallel import EVEN, free_port
from tests.tiny_models import TinyModel, tiny_model

NUM_RANKS = 4


@dataclass(frozen=True)
class Case:
    """How many ranks of which model."""

    tp: int
    pp: int
    family: str = "llama"
    group_size: int | None = None
    model: tuple[tuple[str, Any], ...] = (("num_hidden_layers", 4),)
    host: str = "127.0.0.1"

    def tiny(self) -> TinyModel:
        return tiny_model(self.family, self.group_size, **dict(self.model))

    def job(self) -> Job:
        return Job(self.tp, self.pp, self.tiny().path, f"{self.host}:{free_port()}")


AWQ = tuple({**EVEN, "attention_bias": True, "num_hidden_layers": 3}.items())
CASES = {
    "two stages": Case(1, 2),
    "stages of 2, 1 and 1 layers": Case(1, 3),
    "a layer each": Case(1, 4, host="::1" if HAS_IPV6 else "127.0.0.1"),
    "two stages of two ranks": Case(2, 2),
    "tied": Case(2, 2, model=(("tie_word_embeddings", True),)),
    "awq": Case(2, 2, group_size=16, model=AWQ),
    "qwen3": Case(1, 2, family="qwen3"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Any]:
    """Per case what the ranks gave; one spawn serves all."""
    cache.chmod(0o700)
    out = tmp_path_factory.mktemp("pp") / "results"
    jobs = [case.job() for case in CASES.values()]
    spawn(run_rank, (jobs, prompts(), cache, out), nprocs=NUM_RANKS)  # type: ignore[no-untyped-call]
    return dict(zip(CASES, pickle.loads(out.read_bytes()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_stages_give_what_one_process_gives(name: str, found: dict[str, Any]) -> None:
    case, (info, outputs, stats) = CASES[name], found[name]
    config = case.job().config(None, tp=1, pp=1)
    expected, _ = everything(Engine(config, LocalExecutor(config)), prompts())
    assert (info.tp, info.pp, info.num_blocks) == (case.tp, case.pp, 28)
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert outputs.keys() == expected.keys()
    for request_id, output in outputs.items():
        assert_same(output, expected[request_id])


def assert_same(output: SequenceOutput, expected: SequenceOutput) -> None:
    assert output.token_ids == expected.token_ids
    assert output.finish_reason == expected.finish_reason
    assert output.stop_token_id == expected.stop_token_id
    for one, other in (
        (output.logprobs, expected.logprobs),
        (output.prompt_logprobs, expected.prompt_logprobs),
    ):
        assert (one is None) == (other is None)
        for entry, wanted in zip(one or [], other or [], strict=True):
            assert (entry is None) == (wanted is None)
            if entry is not None and wanted is not None:
                assert entry.token_id == wanted.token_id
                assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
                assert entry.top_token_ids == wanted.top_token_ids


def test_greedy_tokens_are_those_of_transformers(found: dict[str, Any]) -> None:
    tiny = CASES["two stages"].tiny()
    _, outputs, _ = found["two stages"]
    for index in (0, 6, 12, 18):
        prompt = prompts()[index % len(prompts())]
        with torch.inference_mode():
            tokens = tiny.reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=10,
                do_sample=False,
            )
        assert outputs[str(index)].token_ids == tokens[0, len(prompt) :].tolist()


def test_every_stage_has_its_own_file_of_weights(found: dict[str, Any], cache: Path) -> None:
    files = {path.name for path in cache.glob("*.safetensors")}
    assert len(files) == sum(case.tp * case.pp for case in CASES.values())
    assert sum("rank3-of-4" in name for name in files) == 4


def test_layers_are_dealt_evenly_the_first_stages_first() -> None:
    assert [list(stage_layers(4, stage, 3)) for stage in range(3)] == [[0, 1], [2], [3]]
    for num_layers in range(1, 12):
        for pp in range(1, num_layers + 1):
            stages = [stage_layers(num_layers, stage, pp) for stage in range(pp)]
            assert [layer for stage in stages for layer in stage] == list(range(num_layers))
            sizes = [len(stage) for stage in stages]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)


def test_more_stages_than_layers_are_refused() -> None:
    spec = load_spec(tiny_model("llama").path)
    check_pp(spec, 2)
    with pytest.raises(ConfigError, match="pp=3 does not fit this model: it has 2 layers"):
        check_pp(spec, 3)
