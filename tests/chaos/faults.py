"""What can happen to a site. Each fault returns what it did, in a few words."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable

from tests.chaos.load import Load
from tests.chaos.site import Site

Fault = Callable[[Site, Load, random.Random], Awaitable[str]]


async def engine(site: Site, load: Load, rng: random.Random) -> str:
    site.kill(rng.choice(site.pids("EngineActor")))
    return "killed a rank"


async def hang(site: Site, load: Load, rng: random.Random) -> str:
    site.kill(rng.choice(site.pids("EngineActor")), signal.SIGSTOP)
    return "stopped a rank"


async def replica(site: Site, load: Load, rng: random.Random) -> str:
    site.kill(rng.choice(site.pids("LLMReplica")))
    return "killed a replica"


async def node(site: Site, load: Load, rng: random.Random) -> str:
    """The new one comes first: the others may have no room for all replicas."""
    site.add_node()  # not in a thread: Ray sets signal handlers
    await asyncio.to_thread(site.kill_node, rng.randrange(9))
    return "killed a node"


async def haproxy(site: Site, load: Load, rng: random.Random) -> str:
    load.proxy_killed = time.monotonic()
    for pid in site.haproxy_pids():
        site.kill(pid)
    return "killed HAProxy"


async def manager(site: Site, load: Load, rng: random.Random) -> str:
    """Ray ends HAProxy with it."""
    load.proxy_killed = time.monotonic()
    for pid in site.pids("HAProxyManager"):
        site.kill(pid)
    return "killed HAProxy's manager"


async def scale(site: Site, load: Load, rng: random.Random) -> str:
    before = site.deployment["num_replicas"]
    site.deployment["num_replicas"] = rng.choice([n for n in (1, 2, 3) if n != before])
    await asyncio.to_thread(site.deploy)
    return f"scaled {before} to {site.deployment['num_replicas']}"


async def redeploy(site: Site, load: Load, rng: random.Random) -> str:
    """Other settings of the engine: every replica is replaced."""
    site.engine["max_num_seqs"] = rng.randrange(32, 1000)
    await asyncio.to_thread(site.deploy)
    return "redeployed"


FAULTS: dict[str, Fault] = {
    each.__name__: each for each in (engine, hang, replica, node, haproxy, manager, scale, redeploy)
}
KILLING = {each.__name__ for each in (engine, hang, replica, node)}
