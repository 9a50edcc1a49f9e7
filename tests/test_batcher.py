"""The loop around an engine: joining mid-flight, bounded admission, faults, health."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from engine.batch import Batch, Sampling
from engine.batcher import RequestBatcher
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineDeadError, InvalidRequestError, QueueFullError
from engine.outputs import SequenceOutput
from engine.sampling_params import SamplingParams
from engine.sequence import EngineRequest
from tests.scripted_executor import ScriptedExecutor
from tests.test_scheduler import expected, request


class GatedExecutor(ScriptedExecutor):
    """Steps only while the gate is open, and fails once when told to."""

    def __init__(self) -> None:
        super().__init__(num_blocks=256)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def launch(self, batch: Batch, sampling: Sampling) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        super().launch(batch, sampling)


class Client:
    """Takes outputs as a replica does and waits for what a test needs."""

    def __init__(self, **limits: int) -> None:
        self.executor = GatedExecutor()
        config = EngineConfig(model="scripted", max_num_seqs=4)
        self.engine = Engine(config, self.executor)
        self._arrived = threading.Event()
        self.batcher = RequestBatcher(
            self.engine,
            max_waiting_requests=limits.get("max_waiting_requests", 100),
            max_waiting_tokens=limits.get("max_waiting_tokens", 10_000),
            step_timeout_s=limits.get("step_timeout_s", 60),
            on_output=lambda consumers: self._arrived.set(),
        )
        self.outputs: dict[str, SequenceOutput] = {}

    def wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not done():
            assert self._arrived.wait(deadline - time.monotonic())
            self._arrived.clear()
            for output in self.batcher.take()[0]:
                earlier = self.outputs.setdefault(output.request_id, output)
                if earlier is not output:
                    earlier.merge(output)

    def wait_finished(self, *names: str) -> None:
        self.wait(lambda: all(n in self.outputs and self.outputs[n].finish_reason for n in names))


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.executor.gate.set()
    client.batcher.stop()


def test_requests_join_while_others_run(client: Client) -> None:
    prompts = {str(i): [i, i + 1, i + 2] for i in range(12)}
    for name, prompt in prompts.items():
        client.batcher.submit([request(name, prompt, max_tokens=20)])
    client.wait_finished(*prompts)
    for name, prompt in prompts.items():
        assert client.outputs[name].token_ids == expected(prompt, 20)


def test_a_slow_reader_gets_merged_outputs(client: Client) -> None:
    client.batcher.submit([request("a", [1], max_tokens=9)])
    deadline = time.monotonic() + 30
    while client.engine.has_work or not client.executor.num_tokens_per_step:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    client.wait_finished("a")
    assert client.outputs["a"].token_ids == expected([1], 9)


def test_the_queue_is_bounded_by_requests() -> None:
    client = Client(max_waiting_requests=3)
    client.executor.gate.clear()
    client.batcher.submit([request("running", [1])])
    assert client.executor.entered.wait(30)
    client.batcher.submit([request(str(i), [1]) for i in range(5)])
    client.wait_finished("3", "4")
    assert isinstance(client.outputs["3"].error, QueueFullError)
    assert "max_waiting_requests is 3" in str(client.outputs["4"].error)
    client.executor.gate.set()
    client.wait_finished("running", "0", "1", "2")
    assert client.outputs["2"].token_ids == expected([1], 8)
    client.batcher.stop()


def test_no_bound_refuses_what_a_dead_engine_had_taken_in() -> None:
    client = Client(max_waiting_requests=2, max_waiting_tokens=10)
    client.executor.gate.clear()
    names = [str(i) for i in range(6)]
    client.batcher.submit([request(name, [1] * 5) for name in names], admitted=True)
    client.batcher.submit([request("new", [1])])
    client.wait_finished("new")
    assert isinstance(client.outputs["new"].error, QueueFullError)
    client.executor.gate.set()
    client.wait_finished(*names)
    assert all(client.outputs[name].error is None for name in names)
    client.batcher.stop()


def test_the_queue_is_bounded_by_tokens_but_takes_one_request_of_any_size() -> None:
    client = Client(max_waiting_tokens=10)
    client.executor.gate.clear()
    client.batcher.submit([request("running", [1])])
    assert client.executor.entered.wait(30)
    client.batcher.submit([request("big", [1] * 50), request("more", [1])])
    client.wait_finished("more")
    assert "max_waiting_tokens is 10" in str(client.outputs["more"].error)
    client.executor.gate.set()
    client.wait_finished("big")
    assert client.outputs["big"].error is None
    client.batcher.stop()


def test_one_wrong_request_harms_no_other(client: Client) -> None:
    client.batcher.submit([request("good", [1, 2]), request("bad", [999]), request("too", [1, 3])])
    client.wait_finished("good", "bad", "too")
    assert isinstance(client.outputs["bad"].error, InvalidRequestError)
    assert client.outputs["good"].token_ids == expected([1, 2], 8)
    assert client.outputs["too"].token_ids == expected([1, 3], 8)


def test_abort_frees_blocks_before_the_next_step(client: Client) -> None:
    client.executor.gate.clear()
    client.batcher.submit([request("a", [1, 2, 3], max_tokens=100)])
    assert client.executor.entered.wait(30)
    client.batcher.abort(["a", "never seen"])
    client.executor.gate.set()
    client.batcher.submit([request("b", [1])])
    client.wait_finished("b")
    blocks = client.engine.scheduler.block_manager
    assert blocks.num_free_blocks == blocks.num_blocks
    assert len(client.outputs.get("a", SequenceOutput("a")).token_ids) <= 1


def test_a_failed_step_is_reported_with_its_cause(client: Client) -> None:
    client.executor.error = RuntimeError("device lost")
    client.batcher.submit([request("a", [1])])
    with pytest.raises(EngineDeadError, match="RuntimeError: device lost"):
        client.wait_finished("a")
    with pytest.raises(EngineDeadError, match="device lost"):
        client.batcher.check()


def test_a_hanging_step_is_noticed() -> None:
    client = Client(step_timeout_s=0)
    client.batcher.check()
    client.executor.gate.clear()
    client.batcher.submit([request("a", [1])])
    assert client.executor.entered.wait(30)
    with pytest.raises(EngineDeadError, match="makes no progress"):
        client.batcher.check()
    client.executor.gate.set()
    client.wait_finished("a")
    client.batcher.check()
    client.batcher.stop()


def test_stats_follow_the_work(client: Client) -> None:
    params = SamplingParams(max_tokens=3)
    client.batcher.submit(
        [EngineRequest(request_id=str(i), prompt_token_ids=[1, 2], params=params) for i in range(6)]
    )
    client.wait_finished(*map(str, range(6)))
    _, stats = client.batcher.take()
    assert stats.num_prompt_tokens == 12
    assert stats.num_generation_tokens == 18
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
