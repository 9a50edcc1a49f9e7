"""AsyncEngine: the replica's end of the engine group, and the open requests it serves.

One task polls the group for the outputs of all sequences and drops each into the mailbox of its
request; submissions and aborts made in one tick of the loop leave as one call. When the group
dies another takes its place, and every open sequence goes on from the tokens it has: draws depend
on (seed, output position) alone. The group may be another replica's, as whose guest this one then
ends when the engine is gone and nothing is open. Single-threaded: everything runs on the loop that
created it. Knows no text and no HTTP.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import EngineDeadError, MantaError
from engine.outboxes import OWNER
from engine.outputs import EngineStats, SequenceOutput
from engine.sequence import EngineRequest
from serve_app.engine_death import as_death, report_death, with_cause
from serve_app.metrics import Metrics
from serve_app.open_request import OpenRequest, OpenSequence, check_queue

if TYPE_CHECKING:
    from engine.ray_group import EngineGroup

logger = logging.getLogger("ray.serve")

CONNECTED_POLL_S = 0.02
WATCH_S = 1.0  # between questions whether the engine makes progress
BLAME_DEATHS = 4  # of engines that computed a suspect, the last one nothing else
MAX_FRUITLESS_DEATHS = 8  # in a row, without a token of any sequence
GUEST_TRIAL_S = 2.0  # within it guests of one engine try their suspects, each at its own time
REBUILD_TIMEOUT_S = 600  # a bundle whose node is gone may never come back


class ShuttingDownError(EngineDeadError):
    """The replica ended its engine: the server stops, or this replica is not needed any more."""


class AsyncEngine:
    """Owns the group, the open sequences and the tasks. Create it inside the running loop.

    `start_group` makes the group that takes a dead one's place. `on_death` hears of each that
    died, and says whether what it computed may be at fault.
    """

    def __init__(
        self,
        group: "EngineGroup",
        start_group: "Callable[[], Awaitable[EngineGroup]]",
        config: EngineConfig,
        metrics: Metrics,
        on_death: "Callable[[EngineGroup], bool]" = lambda group: True,
    ) -> None:
        self.info = group.info
        self._is_guest = group.consumer != OWNER
        self._start_group = start_group
        self._config = config
        self._metrics = metrics
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._seeds = random.Random(config.seed)
        self._sequences: dict[str, OpenSequence] = {}  # by request id, oldest first
        self._submits: list[EngineRequest] = []
        self._aborts: list[str] = []
        self._on_trial: OpenSequence | None = None  # the suspect that others wait for
        self._num_fruitless = 0  # deaths since the last token
        self._failure: EngineDeadError | None = None
        self._group: EngineGroup | None = None  # None while another is started
        self._calls: set[asyncio.Task[None]] = set()
        self._connect(group)
        self._run_task = self._loop.create_task(self._run())
        self._run_task.add_done_callback(self._on_run_end)

    def open(self, requests: Sequence[EngineRequest]) -> OpenRequest:
        """Submit the sequences of one request. Every open needs its close.

        EngineDeadError when there is no engine any more; QueueFullError when it is being replaced
        and too many wait for it already.
        """
        if self._failure is not None:
            raise self._failure
        if self._group is None or self._on_trial is not None:
            check_queue(self._sequences.values(), requests, self._config)
        opened = OpenRequest([request.request_id for request in requests])
        self._schedule_send()
        for request in requests:
            if request.seed is None and request.params.seed is None:
                request = replace(request, seed=self.new_seed())
            self._sequences[request.request_id] = OpenSequence(request, opened)
            self._submits.append(request)
        return opened

    def close(self, opened: OpenRequest) -> None:
        """Forget a request; what it has not finished is aborted and its blocks become free."""
        for request_id in list(opened.unfinished):
            self.abort(opened, request_id)

    def abort(self, opened: OpenRequest, request_id: str) -> None:
        """End one sequence; one that has ended by itself is ignored."""
        if not opened.end(request_id):
            return
        self._schedule_send()
        self._aborts.append(request_id)
        self._end_trial(self._sequences.pop(request_id))

    def new_seed(self) -> int:
        """For a request without one."""
        return self._seeds.getrandbits(63)

    @property
    def group(self) -> "EngineGroup | None":
        """None while another one is started, and when there will be none."""
        return self._group

    @property
    def is_between_groups(self) -> bool:
        """One died, and another is started."""
        return self._group is None and self._failure is None

    async def connected(self) -> "EngineGroup":
        """The group, as soon as there is one. EngineDeadError when there will be none."""
        while self._group is None:
            await self.check()
            await asyncio.sleep(CONNECTED_POLL_S)
        return self._group

    @property
    def num_open(self) -> int:
        """Sequences submitted and neither finished nor aborted."""
        return len(self._sequences)

    @property
    def has_work(self) -> bool:
        """Also of guests. An engine that is gone has none."""
        return self._group is not None and bool(
            self._sequences or self.stats.num_running or self.stats.num_waiting
        )

    async def check(self) -> None:
        """EngineDeadError when the engine is gone for good; one that is being replaced is not."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the engine actors; requests that are still open fail."""
        self._run_task.cancel()
        self._fail(ShuttingDownError("the replica is shutting down"))
        self._disconnect()

    # -- one group after the other ------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            death = await self._death
            logger.warning("the engine died: %s", with_cause(death))
            assert self._group is not None
            may_be_at_fault = self._on_death(self._group)
            self._disconnect()
            self._blame(may_be_at_fault)
            self._num_fruitless += may_be_at_fault
            if self._is_guest and not self._sequences:
                self._failure = death
                return
            self._connect(await self._replacement(death))
            if self._is_guest and any(s.is_suspect for s in self._sequences.values()):
                await asyncio.sleep(random.uniform(0, GUEST_TRIAL_S))
            self._submit_waiting()

    def _connect(self, group: "EngineGroup") -> None:
        self.info, self._group = group.info, group
        self.stats = EngineStats()  # as of the last poll
        self._death: asyncio.Future[EngineDeadError] = self._loop.create_future()
        self._start(self._poll(group))
        self._start(self._watch(group))

    def _disconnect(self) -> None:
        """End the group's actors, hung ones too, and what was asked of them."""
        for call in self._calls:
            call.cancel()
        if self._group is not None:
            self._group.stop()
        self._group = None

    async def _replacement(self, death: EngineDeadError) -> "EngineGroup":
        """Another group; EngineDeadError when none can be started, or each died without a token."""
        while True:
            if self._num_fruitless > MAX_FRUITLESS_DEATHS:
                raise EngineDeadError(
                    f"{self._num_fruitless} engines died one after the other without a token, "
                    f"the last one: {death}"
                ) from death.__cause__
            if not self._is_guest:
                self._metrics.record_recovery()
            try:
                async with asyncio.timeout(REBUILD_TIMEOUT_S):
                    return await self._start_group()
            except EngineDeadError as error:
                logger.warning("its successor died at its start: %s", with_cause(error))
                death = error
                self._num_fruitless += 1
            except (MantaError, TimeoutError) as error:
                raise EngineDeadError(f"{death}; another cannot be started: {error!r}") from error

    def _blame(self, may_be_at_fault: bool) -> None:
        """Count a death against what the engine computed; a suspect that was alone in it ends."""
        self._on_trial = None
        held = [sequence for sequence in self._sequences.values() if sequence.in_engine]
        for sequence in held:
            sequence.in_engine = False
        if not may_be_at_fault:
            return
        for sequence in islice(held, self._config.max_num_seqs):  # the scheduler runs the oldest
            sequence.num_deaths += 1
        if len(held) == 1 and held[0].num_deaths >= BLAME_DEATHS:
            blamed = held[0].blamed()
            logger.error("%s: %s", blamed.request_id, blamed.error)
            self._dispatch(blamed)

    def _submit_waiting(self) -> None:
        """Submit what the engine does not have, the oldest first; while there are suspects, one."""
        waiting = [sequence for sequence in self._sequences.values() if not sequence.in_engine]
        suspects = [sequence for sequence in waiting if sequence.is_suspect]
        self._on_trial = max(suspects, key=lambda suspect: suspect.num_deaths, default=None)
        self._submits = []
        self._submit([self._on_trial] if self._on_trial else waiting, admitted=True)

    def _end_trial(self, sequence: OpenSequence) -> None:
        """The suspect gained a token or ended: it is the turn of the next, or of all others."""
        if sequence is self._on_trial:
            self._submit_waiting()

    # -- calls of the group ---------------------------------------------------------------------

    async def _poll(self, group: "EngineGroup") -> None:
        while True:
            outputs, stats = await group.poll()
            for output in outputs:
                self._dispatch(output)
            if stats.num_generation_tokens > self.stats.num_generation_tokens:
                self._num_fruitless = 0  # also by tokens of guests alone
            self.stats = stats
            if not self._is_guest:  # whose owner records them
                self._metrics.record_stats(stats)

    def _dispatch(self, output: SequenceOutput) -> None:
        sequence = self._sequences.get(output.request_id)
        if sequence is None:
            return  # aborted while this was on its way
        if output.token_ids:
            self._num_fruitless = 0
        if output.finish_reason is not None:
            del self._sequences[output.request_id]
        sequence.put(output)
        self._end_trial(sequence)

    async def _watch(self, group: "EngineGroup") -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            await group.check()

    def _schedule_send(self) -> None:
        if not self._submits and not self._aborts:
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        """Hand over what this tick collected.

        Arguments beyond 100 KB travel through the object store, so that an abort may be there
        before its submission; the engine's batcher knows how to take that.
        Without a group, or beside a suspect, new sequences wait for _submit_waiting.
        """
        aborts, self._aborts = self._aborts, []
        submits, self._submits = self._submits, []
        if self._group is None:
            return
        if self._on_trial is None:
            opened = [s for r in submits if (s := self._sequences.get(r.request_id)) is not None]
            self._submit(opened, admitted=False)
        if aborts:
            self._start(self._group.abort(aborts))

    def _submit(self, sequences: Sequence[OpenSequence], admitted: bool) -> None:
        if not sequences:
            return
        assert self._group is not None
        for sequence in sequences:
            sequence.in_engine = True
        requests = [sequence.to_resume() for sequence in sequences]
        self._start(self._group.submit(requests, admitted=admitted))

    def _start(self, call: Coroutine[Any, Any, None]) -> None:
        """Any call that fails means that the group is gone, whatever the reason."""
        task = self._loop.create_task(call)
        self._calls.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(partial(report_death, self._death))

    def _on_run_end(self, task: "asyncio.Task[None]") -> None:
        """No group could take the place of a dead one."""
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return  # a guest that was not needed any more
        death = as_death(error)
        logger.error("the engine is gone: %s", with_cause(death))
        self._fail(death)

    def _fail(self, error: EngineDeadError) -> None:
        self._failure = self._failure or error
        mailboxes = {id(s.mailbox): s.mailbox for s in self._sequences.values()}
        self._sequences.clear()
        for mailbox in mailboxes.values():
            mailbox.fail(self._failure)
