"""RayWatch: interrupts this process when one of Ray's has died that nothing replaces.

Without its raylet or GCS a cluster of one node is gone, yet calls to it wait for ever. Everything
else (proxies, the controller, replicas, engines) Serve and the replicas bring back by themselves.
"""

import os
import signal
import threading
import time
from typing import Any

from ray._private import worker

POLL_S = 0.5
NEEDED = ("gcs_server", "raylet")


class RayWatch:
    """Looks at the processes that ray.init has started; on a joined cluster there are none."""

    def __init__(self) -> None:
        self.death: str | None = None  # what died, once something has
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        node: Any = worker._global_node
        while self.death is None:
            time.sleep(POLL_S)
            for kind, process in node.dead_processes():
                if kind in NEEDED:
                    self.death = f"Ray's {kind} ended with code {process.poll()}"
        os.kill(os.getpid(), signal.SIGINT)  # the main thread may wait for an answer
