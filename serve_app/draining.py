"""The end of a replica that Serve stops (a smaller number of replicas, a changed config).

Serve lets open requests end, for graceful_shutdown_timeout_s, then kills the process, which cuts
connections without a word. A deployment learns nothing of this before its last request has ended,
so we look at Serve's object for this replica, and end what is left with an error just in time.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from ray._private.worker import global_worker

POLL_S = 0.5
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


def _serves_replica() -> Any:
    """None in a process that is not an actor of Serve's."""
    actor = global_worker.actors.get(global_worker.actor_id)
    return getattr(actor, "_replica_impl", None)
