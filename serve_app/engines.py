"""Engines: every engine of one model that a replica may use, behind AsyncEngine's interface.

Its own, where it has one, and those of other replicas, whose guest it becomes once a request is
better computed there: tokens come from that engine to this replica in the same coalesced polls as
from its own, and cross no other process. When such an engine dies or leaves, its open sequences
go on in another one. routing.py decides; the directory tells what there is.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.prefix import prefix_hashes
from engine.sequence import EngineRequest
from serve_app.async_engine import AsyncEngine
from serve_app.directory import Entry
from serve_app.metrics import Metrics
from serve_app.open_request import OpenRequest
from serve_app.peers import Load, Peer, QueueMeter
from serve_app.routing import choose, num_matched

if TYPE_CHECKING:
    from engine.executor import EngineInfo
    from engine.ray_group import EngineGroup
    from engine.ray_remote import EngineRef

LOST_S = 10.0  # an engine that was lost but is still told of (it lives) is joined again
RETRY_S = 0.5  # between attempts to find an engine

Attach = Callable[[], Awaitable[Entry]]
Join = Callable[["EngineRef"], "EngineGroup"]


class Engines:
    """Of `model`. `own` is this replica's engine; a model that has none here needs `attach`.

    `attach` asks Serve for a replica of the model, which starts one where there is none, and
    returns its entry. `join` makes the group by which a guest uses an engine.
    """

    def __init__(
        self,
        *,
        replica_id: str,
        config: EngineConfig,
        metrics: Metrics,
        join: Join,
        refer: "Callable[[EngineGroup], EngineRef]",
        own: AsyncEngine | None = None,
        attach: Attach | None = None,
    ) -> None:
        assert own is not None or attach is not None
        self.own = own
        self._replica_id = replica_id
        self._config = config
        self._metrics = metrics
        self._seeds = random.Random(config.seed)
        self._join = join
        self._refer = refer
        self._queue = QueueMeter()
        self._attach = attach
        self._peers: dict[str, Peer] = {}  # by replica id, this one's own too
        self._guests: dict[str, _Guest] = {}  # by the id of the engine each joined first
        self._opened: dict[OpenRequest, _Sent] = {}
        self._last_ref: EngineRef | None = None  # the engine heard of last, which may be gone

    # -- AsyncEngine's interface ----------------------------------------------------------------

    @property
    def info(self) -> "EngineInfo":
        if self.own is not None:
            return self.own.info
        info = self.last_info
        assert info is not None, "ready() comes first"
        return info

    @property
    def last_info(self) -> "EngineInfo | None":
        """None when no engine was heard of yet."""
        return self._last_ref.info if self._last_ref is not None else None

    def open(self, requests: Sequence[EngineRequest], session_id: str | None = None) -> OpenRequest:
        """Submit the sequences of one request to one engine. Every open needs its close."""
        sent = self._choose(requests, session_id)
        opened = sent.engine.open(requests)
        self._opened[opened] = sent
        return opened

    def new_seed(self) -> int:
        """For a request without one."""
        return self.own.new_seed() if self.own is not None else self._seeds.getrandbits(63)

    def abort(self, opened: OpenRequest, request_id: str) -> None:
        self._opened[opened].engine.abort(opened, request_id)

    def close(self, opened: OpenRequest) -> None:
        self._opened.pop(opened).engine.close(opened)

    @property
    def num_open(self) -> int:
        """Sequences this replica has open, in whichever engine."""
        own = self.own.num_open if self.own is not None else 0
        return own + sum(guest.engine.num_open for guest in self._guests.values())

    async def check(self) -> None:
        """EngineDeadError when this replica's own engine is gone for good."""
        if self.own is not None:
            await self.own.check()

    def stop(self) -> None:
        for guest in self._guests.values():
            guest.engine.stop()
        if self.own is not None:
            self.own.stop()

    # -- which engines there are ----------------------------------------------------------------

    async def ready(self) -> None:
        """Until there is an engine to send requests to: a model without replicas gets one."""
        if self.own is None and not self._usable():
            await self._find()

    async def describe(self, model: str) -> Entry:
        """This replica's entry in the directory. Only where there is an own engine."""
        assert self.own is not None
        group, stats = self.own.group, self.own.stats
        entry = Entry(
            self._replica_id,
            model,
            self._refer(group) if group is not None else None,
            stats.num_running + stats.num_waiting,
            self._queue.read(stats),
            await self._prefixes(group) if group is not None else [],
        )
        self._hear(entry)
        return entry

    def update(self, entries: Sequence[Entry]) -> None:
        """What the directory tells of this model's other replicas."""
        present = {entry.replica_id for entry in entries} | {self._replica_id}
        self._peers = {key: peer for key, peer in self._peers.items() if key in present}
        for entry in entries:
            self._hear(entry)
        now = time.monotonic()
        known = {peer.engine.id for peer in self._peers.values() if peer.engine is not None}
        for engine_id, guest in list(self._guests.items()):
            if guest.is_over(now, engine_id in known):
                guest.engine.stop()
                del self._guests[engine_id]

    def _hear(self, entry: Entry) -> None:
        peer = self._peers.setdefault(entry.replica_id, Peer(entry.replica_id))
        peer.hear(entry, self._mine()[entry.replica_id])
        if entry.engine is not None:
            self._last_ref = entry.engine

    async def _prefixes(self, group: "EngineGroup") -> list[int]:
        if not self._config.enable_prefix_caching:
            return []
        try:
            return await group.prefixes()
        except EngineDeadError:  # who polls it learns that too
            return []

    def _usable(self) -> list[Peer]:
        """Other replicas' engines, without those that this replica has seen die."""
        return [
            peer
            for replica_id, peer in self._peers.items()
            if replica_id != self._replica_id
            and peer.engine is not None
            and ((guest := self._guests.get(peer.engine.id)) is None or not guest.is_lost)
        ]

    # -- which engine a request gets --------------------------------------------------------------

    def _choose(self, requests: Sequence[EngineRequest], session_id: str | None) -> "_Sent":
        others = self._usable()
        if not others:
            return _Sent(self.own or self._waiting_guest(), self._replica_id, 0)
        mine = self._peers.get(self._replica_id)
        if mine is not None and self.own is not None and self.own.group is not None:
            others.append(mine)
        hashes = self._hashes(requests[0])
        num_tokens, block_size = len(requests[0].prompt_token_ids), self.info.block_size
        sent = self._mine()
        found = choose(
            num_tokens,
            hashes,
            [peer.candidate(sent[peer.replica_id]) for peer in others],
            block_size=block_size,
            own=self._replica_id,
            session_id=session_id,
        )
        peer = self._peers[found.id]
        num_new = num_tokens - num_matched(hashes, found.prefixes) * block_size
        peer.sent(hashes)
        engine = self.own if peer is mine and self.own is not None else self._guest_of(peer)
        return _Sent(engine, found.id, num_new)

    def _mine(self) -> defaultdict[str, Load]:
        """By replica, what of this one's requests is in its engine now."""
        loads: defaultdict[str, Load] = defaultdict(Load)
        for opened, sent in self._opened.items():
            load = loads[sent.replica_id]
            load.num_sequences += len(opened.unfinished)
            load.num_waiting_tokens += sent.num_new_tokens if opened.is_waiting else 0
        return loads

    def _hashes(self, request: EngineRequest) -> list[int]:
        if not self._config.enable_prefix_caching:
            return []
        token_ids = request.prompt_token_ids
        return prefix_hashes(token_ids, self.info.block_size, request.cache_salt)

    def _guest_of(self, peer: Peer) -> AsyncEngine:
        ref = peer.engine
        assert ref is not None
        if ref.id not in self._guests:
            group = self._join(ref)
            engine = AsyncEngine(group, self._another, self._config, self._metrics)
            self._guests[ref.id] = _Guest(engine, group)
        return self._guests[ref.id].engine

    def _waiting_guest(self) -> AsyncEngine:
        """Of an engine that died since ready(): what is opened goes on in the next one."""
        assert self._last_ref is not None, "ready() comes first"
        group = self._join(self._last_ref)
        engine = AsyncEngine(group, self._another, self._config, self._metrics)
        self._guests[f"{self._last_ref.id} {id(engine)}"] = _Guest(engine, group)
        return engine

    async def _another(self) -> "EngineGroup":
        """Where a guest's open sequences go on: here, or else in the least busy engine."""
        others = self._usable()
        if self.own is not None and (self.own.group is not None or not others):
            return self._join(self._refer(await self.own.connected()))
        if not others:
            return self._join(await self._find())
        ref = min(others, key=lambda peer: peer.others.num_sequences).engine
        assert ref is not None
        return self._join(ref)

    async def _find(self) -> "EngineRef":
        """An engine of a model that has none here; waits for as long as none can be started."""
        assert self._attach is not None
        while True:
            try:
                entry = await self._attach()
            except (RayError, RayServeException, EngineDeadError):
                await asyncio.sleep(RETRY_S)
                continue
            self._hear(entry)
            if entry.engine is not None:
                return entry.engine


@dataclass(frozen=True, slots=True)
class _Sent:
    """Where an open request went, and how many of its tokens were not cached there."""

    engine: AsyncEngine
    replica_id: str
    num_new_tokens: int


class _Guest:
    """This replica as a guest of one engine; its open sequences may have gone on elsewhere."""

    def __init__(self, engine: AsyncEngine, group: "EngineGroup") -> None:
        self.engine = engine
        self._group = group
        self._lost_at: float | None = None

    @property
    def is_lost(self) -> bool:
        return self.engine.group is not self._group

    def is_over(self, now: float, is_known: bool) -> bool:
        """Nothing is open, and its engine is not told of any more, or was lost a while ago."""
        if self.is_lost and self._lost_at is None:
            self._lost_at = now
        lost_long = self._lost_at is not None and now - self._lost_at > LOST_S
        return not self.engine.num_open and (lost_long or not is_known)
