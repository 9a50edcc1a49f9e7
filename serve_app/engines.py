"""Engines: every engine of one model that a replica may use, behind AsyncEngine's interface.

Its own, where it has one, and those of other replicas, whose guest it becomes once a request is
better computed there: tokens come from that engine to this replica in the same coalesced polls as
from its own, and cross no other process. When such an engine dies or leaves, its open sequences
go on in another one. routing.py decides; the directory tells what there is.
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.prefix import prefix_hashes
from engine.sequence import EngineRequest
from serve_app.async_engine import AsyncEngine
from serve_app.directory import Entry
from serve_app.finder import Attach, Finder, OtherVersionError
from serve_app.metrics import Metrics
from serve_app.open_request import OpenRequest
from serve_app.peers import Peer, QueueMeter
from serve_app.routing import Prompt, choose, num_to_compute

if TYPE_CHECKING:
    from engine.executor import EngineInfo
    from engine.ray_group import EngineGroup
    from engine.ray_remote import EngineRef

LOST_S = 10.0  # an engine that was seen to die but is still told of (it lives) is joined again
NOTICED_S = 1.0  # its own replica knows by then, and would not give it to who attaches

Join = Callable[["EngineRef"], "EngineGroup"]


class Engines:
    """Of one model in one version. `own` is this replica's engine; without one, `attach` is needed.

    `attach` asks Serve for a replica of the model, which starts one where there is none, and
    returns its entry. `join` makes the group by which a guest uses an engine.
    """

    def __init__(
        self,
        *,
        replica_id: str,
        version: str,
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
        self._version = version
        self._config = config
        self._metrics = metrics
        self._seeds = random.Random(config.seed)
        self._join = join
        self._refer = refer
        self._queue = QueueMeter()
        self._finder: Finder | None = None
        if attach is not None:
            self._finder = Finder(attach, self._take_in, config.max_waiting_requests)
        self._me = Peer(replica_id)
        self._peers: dict[str, Peer] = {}  # the others, by replica id
        self._guests: dict[str, AsyncEngine] = {}  # by the id of the engine each is in
        self._moved: list[AsyncEngine] = []  # guests whose engine died: what is open goes on
        self._lost: dict[str, float] = {}  # ids of engines that were seen to die, and when
        self._left: set[str] = set()  # ids of engines whose replica has left the directory
        self._opened: dict[OpenRequest, AsyncEngine] = {}
        self._last_ref: EngineRef | None = None  # the engine heard of last, which may be gone

    # -- AsyncEngine's interface ----------------------------------------------------------------

    @property
    def info(self) -> "EngineInfo":
        info = self.last_info
        assert info is not None, "ready() comes first"
        return info

    @property
    def last_info(self) -> "EngineInfo | None":
        """None when no engine was heard of yet."""
        if self.own is not None:
            return self.own.info
        return self._last_ref.info if self._last_ref is not None else None

    def open(self, requests: Sequence[EngineRequest], session_id: str | None = None) -> OpenRequest:
        """Submit the sequences of one request to one engine. Every open needs its close."""
        peer, num_new_tokens = self._choose(requests, session_id)
        if peer is not self._me:
            assert peer.engine is not None
            engine = self._guest_in(peer.engine)
        else:
            engine = self.own or self._waiting_guest()
        opened = engine.open(requests)
        opened.count_in(peer.mine, num_new_tokens)
        self._opened[opened] = engine
        return opened

    def new_seed(self) -> int:
        """For a request without one."""
        return self.own.new_seed() if self.own is not None else self._seeds.getrandbits(63)

    def abort(self, opened: OpenRequest, request_id: str) -> None:
        self._opened[opened].abort(opened, request_id)

    def close(self, opened: OpenRequest) -> None:
        self._opened.pop(opened).close(opened)

    @property
    def num_open(self) -> int:
        """Sequences this replica has open, in whichever engine."""
        own = self.own.num_open if self.own is not None else 0
        return own + sum(guest.num_open for guest in self._all_guests())

    async def check(self) -> None:
        """EngineDeadError when this replica's own engine is gone for good."""
        if self.own is not None:
            await self.own.check()

    def stop(self) -> None:
        for guest in self._all_guests():
            guest.stop()
        if self.own is not None:
            self.own.stop()

    # -- which engines there are ----------------------------------------------------------------

    async def ready(self) -> None:
        """Until there is an engine to send requests to: a model without replicas gets one.

        QueueFullError when too many wait for that.
        """
        if self._finder is not None and not self._usable():
            await self._finder.find_for_request()

    async def describe(self, model: str) -> Entry:
        """This replica's entry in the directory, once per exchange. Only with an own engine."""
        assert self.own is not None
        self._queue.read(self.own.stats)
        entry = await self.entry(model)
        self._me.hear(entry)
        return entry

    async def entry(self, model: str) -> Entry:
        """The same for whoever asks in between."""
        assert self.own is not None
        group, stats = self.own.group, self.own.stats
        return Entry(
            self._replica_id,
            model,
            self._version,
            self._refer(group) if group is not None else None,
            stats.num_running + stats.num_waiting,
            self._queue.num_tokens,
            await self._prefixes(group) if group is not None else [],
        )

    def update(self, entries: Sequence[Entry]) -> None:
        """What the directory tells of this model's other replicas, those of other versions too."""
        told = {entry.replica_id: entry for entry in entries if entry.version == self._version}
        for replica_id in self._peers.keys() - told.keys():
            engine = self._peers.pop(replica_id).engine
            if engine is not None:
                self._left.add(engine.id)
        for entry in told.values():
            self._hear(entry)
        now = time.monotonic()
        self._lost = {key: lost for key, lost in self._lost.items() if now - lost < LOST_S}
        self._end_idle_guests()

    def _end_idle_guests(self) -> None:
        """Of engines that are not told of any more."""
        known = {peer.engine.id for peer in self._peers.values() if peer.engine is not None}
        for engine_id, guest in list(self._guests.items()):
            if engine_id not in known and not guest.num_open:
                self._guests.pop(engine_id).stop()
        for guest in self._moved:
            if not guest.num_open:
                guest.stop()
        self._moved = [guest for guest in self._moved if guest.num_open]
        groups = [guest.group for guest in self._all_guests()]
        self._left &= {group.engine_id for group in groups if group is not None}

    def _hear(self, entry: Entry) -> None:
        self._peers.setdefault(entry.replica_id, Peer(entry.replica_id)).hear(entry)
        if entry.engine is not None:
            self._last_ref = entry.engine
            self._left.discard(entry.engine.id)

    def _take_in(self, entry: Entry) -> "EngineRef | None":
        """What was found by `attach`."""
        if entry.version != self._version:
            raise OtherVersionError(f"{entry.replica_id} has version {entry.version}")
        self._hear(entry)
        engine = entry.engine
        if engine is not None and engine.id in self._lost:
            if time.monotonic() - self._lost[engine.id] < NOTICED_S:
                return None
            del self._lost[engine.id]
        return engine

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
            for peer in self._peers.values()
            if peer.engine is not None and peer.engine.id not in self._lost
        ]

    # -- which engine a request gets --------------------------------------------------------------

    def _choose(
        self, requests: Sequence[EngineRequest], session_id: str | None
    ) -> tuple[Peer, int]:
        """Whose, and how many prompt tokens are to be computed there: 0 when there is no choice."""
        peers = {peer.replica_id: peer for peer in self._usable()}
        if not peers:
            return self._me, 0
        if self.own is not None and self.own.group is not None:
            peers[self._replica_id] = self._me
        prompts = self._prompts(requests)
        block_size = self.info.block_size
        found = choose(
            prompts,
            [peer.candidate() for peer in peers.values()],
            block_size=block_size,
            own=self._replica_id,
            session_id=session_id,
        )
        num_new_tokens = num_to_compute(prompts, found, block_size)
        for prompt in prompts:
            peers[found.id].sent(prompt.hashes)
        return peers[found.id], num_new_tokens

    def _prompts(self, requests: Sequence[EngineRequest]) -> list[Prompt]:
        """Each different one once: its sequences share what is computed of it."""
        lists = {id(request.prompt_token_ids): request for request in requests}.values()
        different = {tuple(request.prompt_token_ids): request for request in lists}.values()
        return [Prompt(len(each.prompt_token_ids), self._hashes(each)) for each in different]

    def _hashes(self, request: EngineRequest) -> list[int]:
        if not self._config.enable_prefix_caching:
            return []
        return prefix_hashes(request.prompt_token_ids, self.info.block_size, request.cache_salt)

    # -- guests -----------------------------------------------------------------------------------

    def _all_guests(self) -> list[AsyncEngine]:
        return [*self._guests.values(), *self._moved]

    def _guest_in(self, ref: "EngineRef") -> AsyncEngine:
        if ref.id not in self._guests:
            self._guests[ref.id] = AsyncEngine(
                self._join(ref), self._another, self._config, self._metrics, self._on_guest_s_death
            )
        return self._guests[ref.id]

    def _waiting_guest(self) -> AsyncEngine:
        """Of an engine that died since ready(): what is opened goes on in the next one."""
        for guest in self._moved:
            if guest.is_between_groups:
                return guest
        assert self._last_ref is not None, "ready() comes first"
        return self._guest_in(self._last_ref)

    def _on_guest_s_death(self, group: "EngineGroup") -> bool:
        """No request is at fault when the engine's replica was stopped, or it was dead before."""
        self._lost[group.engine_id] = time.monotonic()
        guest = self._guests.pop(group.engine_id, None)
        if guest is not None:
            self._moved.append(guest)
        return group.is_joined and group.engine_id not in self._left

    async def _another(self) -> "EngineGroup":
        """Where a guest's open sequences go on: here, or else in the least busy engine."""
        others = self._usable()
        if self.own is not None and (self.own.group is not None or not others):
            return self._join(self._refer(await self.own.connected()))
        if not others:
            assert self._finder is not None
            return self._join(await self._finder.find())
        ref = min(others, key=lambda peer: peer.candidate().num_sequences).engine
        assert ref is not None
        return self._join(ref)
