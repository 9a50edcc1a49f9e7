"""The end of a replica that Serve stops (a smaller number of replicas, a changed config).

Serve lets open requests end, for graceful_shutdown_timeout_s, then kills the process, which cuts
connections without a word. A deployment learns nothing of this before its last request has ended,
so we look at Serve's object for this replica, and end what is left with an error just in time.
Requests of other replicas that its engine computes are unknown to Serve: wait_for_guests.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray._private.worker import global_worker

from serve_app.async_engine import AsyncEngine
from serve_app.directory import Member

logger = logging.getLogger("ray.serve")

POLL_S = 0.5
GUESTS_POLL_S = 0.05
LAST_WORDS_S = 2.0  # for errors to reach their clients, also when they read slowly


async def end_before_kill(leave: Callable[[], None], stop: Callable[[], None]) -> None:
    """Calls `leave` once Serve has stopped this replica, `stop` when its time is almost over."""
    replica = _serves_replica()
    if replica is None:
        return
    while not replica._shutting_down:
        await asyncio.sleep(POLL_S)
    leave()
    patience_s: float = replica._deployment_config.graceful_shutdown_timeout_s
    await asyncio.sleep(max(0.0, patience_s - POLL_S - LAST_WORDS_S))
    stop()


async def wait_for_guests(member: Member, own: AsyncEngine) -> None:
    """Leave the directory, and let the engine end what others sent there; its stop ends this."""
    member.leave()
    if own.group is not None:
        await member.forgotten()
    while own.has_work:
        await asyncio.sleep(GUESTS_POLL_S)


def log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("open requests may end without a word", exc_info=task.exception())


def _serves_replica() -> Any:
    """None in a process that is not an actor of Serve's."""
    actor = global_worker.actors.get(global_worker.actor_id)
    return getattr(actor, "_replica_impl", None)
