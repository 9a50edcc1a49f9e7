"""Engine: the loop body. Requests in, one step at a time, outputs out; single-threaded.

    step:  schedule → build → launch, while there is room in flight; then collect → update

Knows no text, no HTTP, no processes.
"""

import logging
from collections import deque

from engine.batch import Batch, Sampling
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.executor import EngineInfo, Executor
from engine.outputs import EngineStats, SequenceOutput
from engine.scheduled_batch import ScheduledBatch
from engine.scheduler import Scheduler
from engine.sequence import EngineRequest

logger = logging.getLogger(__name__)


class Engine:
    """One scheduler over one executor."""

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self.executor = executor
        self.info: EngineInfo = executor.info
        # What became of settings that not every device and group can follow.
        logger.info("engine in force: %s", self.info)
        self.scheduler = Scheduler(
            BlockManager(self.info.num_blocks, self.info.block_size, config.enable_prefix_caching),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            session_len=self.info.session_len,
            seed=config.seed,
            num_stages=self.info.pp,
        )
        self._in_flight: deque[ScheduledBatch] = deque()  # launched, the oldest first

    def add(self, request: EngineRequest) -> None:
        """Queue a request; InvalidRequestError when it could never be served."""
        request.params.validate_vocab(self.info.vocab_size)
        _check_vocab(request.prompt_token_ids + request.output_token_ids, self.info.vocab_size)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds; unknown ids are ignored."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self.scheduler.num_waiting_tokens

    def step(self) -> list[SequenceOutput]:
        """Finish the oldest step in flight, after launching as many as the executor takes.

        At least one sequence advances while there is work.
        """
        while len(self._in_flight) < self.info.max_in_flight:
            scheduled = self.scheduler.schedule()
            if not scheduled.seqs:
                break
            sampling = Sampling.build(scheduled)
            self.executor.launch(Batch.build(scheduled, sampling.scores), sampling)
            self._in_flight.append(scheduled)
        assert self._in_flight, "step() needs work"
        result = self.executor.collect()
        return self.scheduler.update(self._in_flight.popleft(), result)

    def cached_prefixes(self, limit: int) -> list[int]:
        """What engine.prefix.prefix_hashes gives of prompts whose keys and values are cached."""
        return self.scheduler.cached_prefixes(limit)

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def close(self) -> None:
        """Steps in flight are computed: the ranks would wait for each other over them."""
        while self._in_flight:
            self._in_flight.popleft()
            self.executor.collect()
        self.executor.close()


def _check_vocab(token_ids: list[int], vocab_size: int) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"the prompt holds token id {token_id}; the vocabulary has ids 0 to "
                f"{vocab_size - 1}",
                "prompt",
            )
