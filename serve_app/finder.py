"""Finder: an engine of a model that has none in this replica. All who wait share one call."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from engine.errors import EngineDeadError, QueueFullError
from serve_app.directory import Entry

if TYPE_CHECKING:
    from engine.ray_remote import EngineRef

RETRY_S = 0.5  # between attempts
UPDATE_S = 10.0  # while a model is updated it may have replicas of another version alone

Attach = Callable[[], Awaitable[Entry]]


class OtherVersionError(EngineDeadError):
    """This replica belongs to one version of the application, the model's replicas to another."""


class Finder:
    """`attach` asks Serve for a replica of the model, which starts one where there is none.

    `accept` takes its entry and returns its engine, None when that one cannot be used now.
    OtherVersionError from it is passed on when it stays so.
    """

    def __init__(
        self, attach: Attach, accept: "Callable[[Entry], EngineRef | None]", max_waiting: int
    ) -> None:
        self._attach = attach
        self._accept = accept
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._search: asyncio.Task[EngineRef] | None = None

    async def find_for_request(self) -> "EngineRef":
        """QueueFullError when too many requests wait already."""
        if self._num_waiting >= self._max_waiting:
            raise QueueFullError(
                f"{self._num_waiting} requests wait for the model to start and "
                f"max_waiting_requests is {self._max_waiting}; try again later"
            )
        return await self.find()

    async def find(self) -> "EngineRef":
        """Waits for as long as none can be started. OtherVersionError."""
        if self._search is None or self._search.done():
            self._search = asyncio.get_running_loop().create_task(self._find())
        search = self._search
        self._num_waiting += 1
        try:
            return await asyncio.shield(search)
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                search.cancel()
                self._search = None

    async def _find(self) -> "EngineRef":
        num_tries_left = round(UPDATE_S / RETRY_S)
        while True:
            try:
                engine = self._accept(await self._attach())
            except OtherVersionError:
                num_tries_left -= 1
                if not num_tries_left:
                    raise
            except (RayError, RayServeException, EngineDeadError):
                pass  # it starts, or another takes its place
            else:
                if engine is not None:
                    return engine
            await asyncio.sleep(RETRY_S)
