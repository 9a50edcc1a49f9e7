"""Scheduler: which sequences compute how many tokens in the next step, in which blocks.

There is no prefill phase and no decode phase. Each sequence has tokens that are not computed
yet; a step hands out a token budget, running sequences first, among them those that need one
token. Chunked prefill, prefix hits, recompute after preemption and resumed streams are all the
same subtraction (`num_uncomputed_tokens`). Sole owner of every Sequence; knows no tensors.

`schedule` may run again before `update` of the previous step: sampled tokens whose values are
not known here yet are counted as `num_pending_tokens`. A sequence that turns out to have ended
was computed once too often then. Its blocks and row may be given away at once all the same: workers
compute the steps in order. With `num_stages` > 1 as many steps are in flight, and a sequence waits
for its token; each step takes its share of the running ones, so that those in flight are equal.
"""

import secrets
import time
from collections import deque
from itertools import chain

from engine.block_manager import BlockManager
from engine.block_tables import TableChanges
from engine.errors import InvalidRequestError
from engine.outputs import EngineStats, SequenceOutput, StepResult
from engine.prefix import short
from engine.reports import append_token, without_token
from engine.scheduled_batch import ScheduledBatch
from engine.sequence import EngineRequest, Sequence, Status


class Scheduler:
    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        session_len: int,
        seed: int | None = None,
        num_stages: int = 1,
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.session_len = session_len
        self.num_stages = num_stages
        self.waiting: deque[Sequence] = deque()
        self.num_waiting_tokens = 0
        self.running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._tables = TableChanges(session_len, block_manager.block_size)
        self._seed = secrets.randbits(63) if seed is None else seed
        self._num_requests = 0
        self._counters = dict.fromkeys(_COUNTERS, 0)

    # -- requests ---------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request. InvalidRequestError when it could never be served."""
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", "request_id")
        self._num_requests += 1
        seed = hash((self._seed, self._num_requests))
        seq = Sequence.from_request(request, self.session_len, seed)
        self._counters["num_arrived"] += 1
        self._sequences[request.request_id] = seq
        self.waiting.append(seq)
        self.num_waiting_tokens += seq.num_tokens

    def abort(self, request_id: str) -> None:
        """End a sequence and free its blocks; unknown or finished ids are ignored."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._finish(seq)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    # -- one step ---------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """Hand out the token budget. The batch is empty when nothing can be computed now."""
        batch = ScheduledBatch()
        budget = self.max_num_batched_tokens
        decodes = self._ready_decodes()
        chunks = [seq for seq in self.running if seq.num_uncomputed_tokens > 1]
        num_running = len(self.running)
        for seq in (*decodes, *chunks):
            if budget == 0:
                break
            budget -= self._schedule_running(seq, batch, budget)
        if len(self.running) == num_running:  # nobody was preempted: there is room for more
            self._schedule_waiting(batch, budget)
        if batch.seqs:
            self._launch(batch)
        return batch

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[SequenceOutput]:
        """Take in what a step computed; returns what each sequence has to report."""
        outputs: list[SequenceOutput] = []
        for row, prompt_logprobs in result.prompt_logprobs:
            batch.seqs[row].prompt_logprobs.extend(prompt_logprobs)
        logprobs = result.logprobs or [None] * len(batch.sampled)
        for seq in batch.seqs:
            seq.num_steps_in_flight -= 1
        invalid = {batch.sampled[index] for index in result.invalid}
        for row, token_id, entry in zip(
            batch.sampled, result.token_ids.tolist(), logprobs, strict=True
        ):
            seq = batch.seqs[row]
            seq.num_pending_tokens -= 1
            if seq.status is Status.FINISHED:  # aborted while the step ran
                continue
            if row in invalid:
                if seq.status is Status.WAITING:  # preempted, and counted with this token
                    self.num_waiting_tokens -= 1
                outputs.append(without_token(seq))
            else:
                outputs.append(append_token(seq, token_id, entry))
                self._counters["num_generation_tokens"] += 1
        for seq in batch.seqs:
            if seq.status is Status.RUNNING:
                self.block_manager.cache_full_blocks(seq)
        for output in outputs:
            if output.finish_reason is not None:
                self._finish(self._sequences[output.request_id])
        return outputs

    def stats(self) -> EngineStats:
        blocks = self.block_manager
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_waiting_tokens=self.num_waiting_tokens,
            oldest_waiting_s=self._oldest_waiting_s,
            kv_cache_usage=1.0 - blocks.num_free_blocks / blocks.num_blocks,
            **self._counters,
        )

    def cached_prefixes(self, limit: int) -> list[int]:
        """Short hashes of up to `limit` cached prefixes, those used last first."""
        in_use = (
            content
            for seq in reversed(self.running)
            for content in seq.block_hashes[: seq.num_cached_blocks]
        )
        found: dict[bytes, None] = {}
        for content in chain(in_use, self.block_manager.free_hashes()):
            found[content] = None
            if len(found) == limit:
                break
        return list(map(short, found))

    def check_integrity(self) -> None:
        """Assert that blocks and rows are free or owned, never both, and counters agree."""
        self.block_manager.check_integrity([seq.block_table for seq in self._sequences.values()])
        rows = [seq.row for seq in self.running]
        assert sorted(rows + self._free_rows) == list(range(self.max_num_seqs))
        for seq in self.running:
            num_slots = len(seq.block_table) * self.block_manager.block_size
            assert seq.num_computed_tokens <= num_slots
        for seq in self.waiting:
            assert not seq.block_table
            assert seq.row == -1
        assert self.num_waiting_tokens == sum(seq.num_tokens for seq in self.waiting)

    # -- helpers, in call order -------------------------------------------------------------

    def _ready_decodes(self) -> list[Sequence]:
        """Running sequences that need one token, at most a stage's share of them."""
        decodes = [seq for seq in self.running if seq.num_uncomputed_tokens == 1]
        if self.num_stages == 1:
            return decodes
        share = -(-len(self.running) // self.num_stages)
        return [seq for seq in decodes if not seq.num_pending_tokens][:share]

    def _schedule_running(self, seq: Sequence, batch: ScheduledBatch, budget: int) -> int:
        """Give `seq` its tokens; returns the budget used (negative: preemption gave some back)."""
        if seq.status is not Status.RUNNING or seq.num_output_tokens >= seq.max_output_tokens:
            return 0  # preempted just now, or its last token is pending
        num_new = min(seq.num_uncomputed_tokens, budget)
        returned = 0
        missing = self.block_manager.num_missing_blocks(seq, seq.num_computed_tokens + num_new)
        while missing > self.block_manager.num_free_blocks:
            victim = self.running[-1]  # the youngest: least work lost, first come first served
            returned += batch.remove(victim)
            self._preempt(victim)
            if victim is seq:
                return -returned
        self._extend(seq, missing)
        batch.append(seq, num_new)
        return num_new - returned

    def _schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0 and self._free_rows:
            seq = self.waiting[0]
            if seq.num_steps_in_flight:  # preempted while a step computes its tokens
                break
            block_ids = self.block_manager.find_prefix(seq)
            num_cached = len(block_ids) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, budget)
            missing = -(-(num_cached + num_new) // self.block_manager.block_size) - len(block_ids)
            taken = missing + self.block_manager.count_free(block_ids)
            if taken + self._reserve > self.block_manager.num_free_blocks:
                break
            self.waiting.popleft()
            self.num_waiting_tokens -= seq.num_tokens
            self._admit(seq, block_ids)
            self._extend(seq, missing)
            batch.append(seq, num_new)
            batch.new_rows.append(seq)
            budget -= num_new

    @property
    def _oldest_waiting_s(self) -> float:
        """Those at the front may be preempted ones, whose clients have tokens already."""
        now = time.monotonic()
        waits = (now - s.request.arrival_time for s in self.waiting if s.num_output_tokens == 0)
        return next(waits, 0.0)

    @property
    def _reserve(self) -> int:
        """Free blocks kept for what runs already, so that admission does not cause preemption."""
        return min(len(self.running), self.block_manager.num_blocks // 16)

    def _admit(self, seq: Sequence, block_ids: list[int]) -> None:
        seq.row = self._free_rows.pop()
        seq.status = Status.RUNNING
        self.running.append(seq)
        self.block_manager.take_prefix(seq, block_ids)
        self._tables.note(seq, 0)
        seq.num_computed_tokens = len(block_ids) * self.block_manager.block_size
        self._counters["prefix_cache_queries"] += seq.num_tokens
        self._counters["prefix_cache_hits"] += seq.num_computed_tokens
        if seq.first_scheduled_time is None:
            seq.first_scheduled_time = time.monotonic()
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
            self._counters["num_admitted"] += 1
            self._counters["num_prompt_tokens"] += seq.num_prompt_tokens

    def _extend(self, seq: Sequence, num_blocks: int) -> None:
        if num_blocks > 0:
            start = len(seq.block_table)
            self.block_manager.extend(seq, num_blocks)
            self._tables.note(seq, start)

    def _launch(self, batch: ScheduledBatch) -> None:
        """Order the rows, and count the step's work as done: it is computed before the next."""
        order = sorted(range(len(batch.seqs)), key=lambda i: batch.num_new_tokens[i] > 1)
        batch.seqs = [batch.seqs[i] for i in order]
        batch.num_new_tokens = [batch.num_new_tokens[i] for i in order]
        batch.num_decodes = batch.num_new_tokens.count(1)
        for row, (seq, num_new) in enumerate(zip(batch.seqs, batch.num_new_tokens, strict=True)):
            seq.num_computed_tokens += num_new
            seq.num_steps_in_flight += 1
            if seq.num_computed_tokens == seq.num_tokens:
                seq.num_pending_tokens += 1
                batch.sampled.append(row)
        batch.table_changes = self._tables.take_changes()
        self._counters["num_steps"] += 1
        self._counters["num_batched_tokens"] += batch.num_tokens

    def _preempt(self, seq: Sequence) -> None:
        """Give back everything of a running sequence; it will be recomputed from its tokens."""
        self._vacate(seq)
        seq.status = Status.WAITING
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self._counters["num_preemptions"] += 1
        self.waiting.appendleft(seq)
        self.num_waiting_tokens += seq.num_tokens

    def _finish(self, seq: Sequence) -> None:
        if seq.status is Status.RUNNING:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)
            self.num_waiting_tokens -= seq.num_tokens
        seq.status = Status.FINISHED
        del self._sequences[seq.request_id]

    def _vacate(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.block_manager.release(seq)
        self._free_rows.append(seq.row)
        seq.row = -1


_COUNTERS = (
    "num_arrived",
    "num_admitted",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_steps",
    "num_batched_tokens",
)
